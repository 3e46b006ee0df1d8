#!/usr/bin/env python3
"""Decode under sparse policies against dense decode, in interleaved rounds of `sparseserve bench engine`.

    python bench/sparse.py target/release/sparseserve MODEL --rounds 3 --threads 2
    python bench/sparse.py target/release/sparseserve MODEL --policies dense,quest --contexts 65000 --batches 1 --threads 2

`seerattention` needs a gate: `python bench/random_model.py MODEL --gate`.

KV is filled with random values, so this measures speed alone. Every case of a round runs once, one after the other; the
table has the median over rounds with the smallest and largest, ratios taken round by round. Needs nothing but Python.
"""

import argparse
import json
import statistics
import subprocess

POLICIES = (
    "dense,streaming,random,replay,quest,arkvale,arkvale:partition=16:sinks=16:window=16,shadowkv,seerattention,retroinfer"
)


def decode(args, policy, context, batch):
    policy, *options = policy.split(":")
    command = [args.sparseserve, "bench", "engine", args.model, "--json", "--context", str(context)]
    command += ["--batch", str(batch), "--steps", str(args.steps), "--policy", policy, "--budget", args.budget]
    command += ["--threads", str(args.threads)] + [f"--policy-opt={option}" for option in options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)["decode"]


def spread(values, form):
    low, high = min(values), max(values)
    return f"{form.format(statistics.median(values))} ({form.format(low)}-{form.format(high)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparseserve")
    parser.add_argument("model")
    parser.add_argument("--contexts", default="8192,32000")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--policies", default=POLICIES, help=f"the first is compared with [default: {POLICIES}]")
    parser.add_argument("--budget", default="1024", help="tokens, or a share of the context, as in 12.5%%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    shapes = [(int(c), int(b)) for c in args.contexts.split(",") for b in args.batches.split(",")]
    policies = args.policies.split(",")
    seen = {(shape, policy): [] for shape in shapes for policy in policies}
    for number in range(args.rounds):
        # Another order each round: machines drift.
        order = policies[number % len(policies) :] + policies[: number % len(policies)]
        for shape in shapes:
            for policy in order:
                seen[shape, policy].append(decode(args, policy, *shape))
    print(f"| context | batch | policy | tokens/s | of the bound | against {policies[0]} |\n|---|---|---|---|---|---|")
    for shape in shapes:
        dense = [row["tokens_per_s"] for row in seen[shape, policies[0]]]
        for policy in policies:
            rows = seen[shape, policy]
            rates = [row["tokens_per_s"] for row in rows]
            ratios = [rate / base for rate, base in zip(rates, dense)]
            fraction = spread([row["fraction"] for row in rows], "{:.2f}")
            print(f"| {shape[0]} | {shape[1]} | `{policy}` | {spread(rates, '{:.1f}')} | {fraction} | {spread(ratios, '{:.2f}')} |")


if __name__ == "__main__":
    main()
