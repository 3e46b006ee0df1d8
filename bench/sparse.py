#!/usr/bin/env python3
"""Decode under sparse policies against dense decode, in interleaved rounds of `sparseserve bench engine`.

    python bench/sparse.py target/release/sparseserve MODEL --rounds 3 --threads 2

KV is filled with random values, so this measures speed alone. Every case of a round runs once, one after the other; the
table has the median over rounds with the smallest and largest, ratios taken round by round. Needs nothing but Python.
"""

import argparse
import json
import statistics
import subprocess

POLICIES = ["dense", "quest", "arkvale", "shadowkv"]


def decode(args, policy, context, batch):
    command = [args.sparseserve, "bench", "engine", args.model, "--json", "--context", str(context)]
    command += ["--batch", str(batch), "--steps", str(args.steps), "--policy", policy, "--budget", str(args.budget)]
    command += ["--threads", str(args.threads)]
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
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    shapes = [(int(c), int(b)) for c in args.contexts.split(",") for b in args.batches.split(",")]
    seen = {(shape, policy): [] for shape in shapes for policy in POLICIES}
    for number in range(args.rounds):
        # Another order each round: machines drift.
        order = POLICIES[number % len(POLICIES) :] + POLICIES[: number % len(POLICIES)]
        for shape in shapes:
            for policy in order:
                seen[shape, policy].append(decode(args, policy, *shape))
    print("| context | batch | policy | tokens/s | of the bound | against dense |\n|---|---|---|---|---|---|")
    for shape in shapes:
        dense = [row["tokens_per_s"] for row in seen[shape, "dense"]]
        for policy in POLICIES:
            rows = seen[shape, policy]
            rates = [row["tokens_per_s"] for row in rows]
            ratios = [rate / base for rate, base in zip(rates, dense)]
            fraction = spread([row["fraction"] for row in rows], "{:.2f}")
            print(f"| {shape[0]} | {shape[1]} | {policy} | {spread(rates, '{:.1f}')} | {fraction} | {spread(ratios, '{:.2f}')} |")


if __name__ == "__main__":
    main()
