#!/usr/bin/env python3
"""Decode with a bounded HBM tier against unified memory, in interleaved rounds of `sparseserve bench engine`.

    python bench/tiers.py target/release/sparseserve MODEL --rounds 3 --threads 2

Random KV has no locality, so selections come from the policy `replay` at a stated overlap from step to step; every line
says which. The table has the median over rounds with the smallest and largest, ratios taken round by round. Needs nothing
but Python.
"""

import argparse
import json
import statistics
import subprocess


def decode(args, context, batch, overlap, hbm):
    command = [args.sparseserve, "bench", "engine", args.model, "--json", "--context", str(context)]
    command += ["--batch", str(batch), "--steps", str(args.steps), "--threads", str(args.threads)]
    command += ["--policy", "replay", "--policy-opt", f"overlap={overlap}", "--budget", str(args.budget)]
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
    parser.add_argument("--overlaps", default="0.7,0.85,0.95")
    parser.add_argument("--hbm", default="10%")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    split = lambda text, kind: [kind(part) for part in text.split(",")]
    cases = [(c, b, o) for c in split(args.contexts, int) for b in split(args.batches, int) for o in split(args.overlaps, float)]
    seen = {case: [] for case in cases}
    for number in range(args.rounds):
        for case in cases:
            # Another order each round: machines drift.
            order = [None, args.hbm] if number % 2 == 0 else [args.hbm, None]
            rows = {hbm: decode(args, *case, hbm) for hbm in order}
            seen[case].append((rows[None], rows[args.hbm]))
    print("| context | batch | overlap | unified, tokens/s | tiered, tokens/s | ratio | hit | pages fetched a step |")
    print("|---|---|---|---|---|---|---|---|")
    for case, rounds in seen.items():
        unified = [u["decode"]["tokens_per_s"] for u, _ in rounds]
        tiered = [t["decode"]["tokens_per_s"] for _, t in rounds]
        ratios = [t / u for t, u in zip(tiered, unified)]
        pages = rounds[0][1]["pages"]
        fetched = pages["misses_per_step"] + pages["streamed_per_step"]
        print(
            f"| {case[0]} | {case[1]} | {case[2]} | {spread(unified, '{:.1f}')} | {spread(tiered, '{:.1f}')} "
            f"| {spread(ratios, '{:.2f}')} | {100 * pages['hit_rate']:.1f} % | {fetched:.0f} |"
        )


if __name__ == "__main__":
    main()
