#!/usr/bin/env python3
"""Decode over an emulated link, page by page against fused, in interleaved rounds of `sparseserve bench engine`.

    python bench/link.py target/release/sparseserve MODEL --rounds 3 --threads 2

What fragmented copies cost (SparseServe, arXiv 2509.24626): a call per page spends its time on calls, one call per layer on bytes.
GB/s are the bytes that a step fetches over the time that `gather` takes, of the operations of a decode step. Selections come from the
policy `replay` at a stated overlap from step to step, for random KV has no locality. The table has the median over rounds with the
smallest and largest, ratios taken round by round. Needs nothing but Python.
"""

import argparse
import json
import statistics
import subprocess


def decode(args, batch, page_tokens, link, transfer):
    command = [args.sparseserve, "bench", "engine", args.model, "--json", "--profile", "--context", str(args.context)]
    command += ["--batch", str(batch), "--steps", str(args.steps), "--threads", str(args.threads)]
    command += ["--policy", "replay", "--policy-opt", f"overlap={args.overlap}", "--budget", args.budget]
    command += ["--hbm", args.hbm, "--page-tokens", str(page_tokens), "--transfer", transfer]
    command += ["--emulate-link", link] if link else []
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(result.stdout)
    gather_ms = sum(op["ms"] for op in row["profile"] if op["op"] == "gather")
    pages = row["pages"]
    return {
        "tokens/s": row["decode"]["tokens_per_s"],
        "GB/s": pages["fetched_bytes_per_step"] / gather_ms / 1e6,
        "gather": gather_ms / row["decode"]["step_ms"],
        "fetched": pages["fetched_bytes_per_step"],
        "calls": pages["link_calls_per_step"],
    }


def spread(values, form):
    low, high = min(values), max(values)
    return f"{form.format(statistics.median(values))} ({form.format(low)}-{form.format(high)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparseserve")
    parser.add_argument("model")
    parser.add_argument("--links", default="25,4;50,4", help="as --emulate-link has them, separated by semicolons")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--page-tokens", default="16,64")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--overlap", default="0.85")
    parser.add_argument("--hbm", default="20%")
    parser.add_argument("--budget", default="1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    cases = [(int(b), int(p)) for b in args.batches.split(",") for p in args.page_tokens.split(",")]
    links = args.links.split(";")
    # Memory alone shows what the copies themselves allow.
    ways = [("", "fused")] + [(link, transfer) for link in links for transfer in ["per-page", "fused"]]
    seen = {(case, way): [] for case in cases for way in ways}
    for number in range(args.rounds):
        for case in cases:
            # Another order each round: machines drift.
            for way in ways if number % 2 == 0 else reversed(ways):
                seen[case, way].append(decode(args, *case, *way))
    print("| batch | page | link | transfer | calls a step | fetched a step | fetches, GB/s | of a step | tokens/s | against per-page |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (case, (link, transfer)), rounds in seen.items():
        of = lambda key: [row[key] for row in rounds]
        per_page = seen[case, (link, "per-page")] if link else None
        ratios = [row["tokens/s"] / other["tokens/s"] for row, other in zip(rounds, per_page or rounds)]
        print(
            f"| {case[0]} | {case[1]} tokens | {link or 'none'} | `{transfer}` | {statistics.median(of('calls')):.0f} "
            f"| {statistics.median(of('fetched')) / 1e6:.1f} MB | {spread(of('GB/s'), '{:.2f}')} "
            f"| {spread([100 * g for g in of('gather')], '{:.0f}')} % | {spread(of('tokens/s'), '{:.1f}')} "
            f"| {spread(ratios, '{:.2f}') if per_page else ''} |"
        )


if __name__ == "__main__":
    main()
