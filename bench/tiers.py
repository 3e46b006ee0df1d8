#!/usr/bin/env python3
"""Decode with a bounded HBM tier against unified memory, in interleaved rounds of `sparseserve bench engine`.

    python bench/tiers.py target/release/sparseserve MODEL --rounds 3 --threads 2

Random KV has no locality, so selections come from the policy `replay` at a stated overlap from step to step; those of other
policies are nearly unlike each other. The bound is that of unified memory: what is fetched is not in it. The table has the median over rounds with the smallest and largest, ratios taken round by round. Needs nothing
but Python.
"""

import argparse
import json
import statistics
import subprocess

POLICIES = "replay:overlap=0.7,replay:overlap=0.85,replay:overlap=0.95"


def decode(args, context, batch, policy, hbm):
    policy, *options = policy.split(":")
    command = [args.sparseserve, "bench", "engine", args.model, "--json", "--context", str(context)]
    command += ["--batch", str(batch), "--steps", str(args.steps), "--threads", str(args.threads)]
    command += ["--policy", policy, "--budget", args.budget] + [f"--policy-opt={option}" for option in options]
    command += ["--hbm", hbm] if hbm else []
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def spread(values, form):
    low, high = min(values), max(values)
    return f"{form.format(statistics.median(values))} ({form.format(low)}-{form.format(high)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparseserve")
    parser.add_argument("model")
    parser.add_argument("--contexts", default="8192,32000")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--policies", default=POLICIES, help=f"[default: {POLICIES}]")
    parser.add_argument("--hbm", default="10%")
    parser.add_argument("--budget", default="1024", help="tokens, or a share of the context, as in 12.5%%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    split = lambda text, kind: [kind(part) for part in text.split(",")]
    policies = args.policies.split(",")
    cases = [(c, b, p) for c in split(args.contexts, int) for b in split(args.batches, int) for p in policies]
    seen = {case: [] for case in cases}
    for number in range(args.rounds):
        for case in cases:
            # Another order each round: machines drift.
            order = [None, args.hbm] if number % 2 == 0 else [args.hbm, None]
            rows = {hbm: decode(args, *case, hbm) for hbm in order}
            seen[case].append((rows[None], rows[args.hbm]))
    print("| context | batch | policy | unified, tokens/s | tiered, tokens/s | ratio | tiered, of the bound | hit | pages fetched a step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case, rounds in seen.items():
        unified = [u["decode"]["tokens_per_s"] for u, _ in rounds]
        tiered = [t["decode"]["tokens_per_s"] for _, t in rounds]
        ratios = [t / u for t, u in zip(tiered, unified)]
        fractions = [t["decode"]["fraction"] for _, t in rounds]
        pages = rounds[0][1]["pages"]
        fetched = pages["misses_per_step"] + pages["streamed_per_step"]
        print(
            f"| {case[0]} | {case[1]} | `{case[2]}` | {spread(unified, '{:.1f}')} | {spread(tiered, '{:.1f}')} "
            f"| {spread(ratios, '{:.2f}')} | {spread(fractions, '{:.2f}')} | {100 * pages['hit_rate']:.1f} % | {fetched:.0f} |"
        )


if __name__ == "__main__":
    main()
