#!/usr/bin/env python3
"""This machine's rates, as torch reaches them: the best bf16 GEMM of three shapes, the best sum of 1 GiB.

    taskset -c 0-3 python bench/calibrate.py --threads 4

Prints {"bf16_gemm_gflops": ..., "read_gb_per_s": ...}, as bench/peers.py wants it of a calibration. Needs torch.
"""

import argparse
import json
import time
from functools import partial

import torch

SHAPES = [(1024, 1024, 3072), (1024, 3072, 1024), (2048, 2048, 2048)]  # m, k, n
READ_BYTES = 2**30  # far more than any last-level cache


def best_time(work, repeats: int) -> float:
    times = []
    for _ in range(repeats):  # the fastest counts, so warming up needs no rounds of its own
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=4)
    torch.set_num_threads(parser.parse_args().threads)
    gflops = 0.0
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
        gflops = max(gflops, 2 * m * k * n / best_time(partial(torch.matmul, a, b), 20) / 1e9)
    x = torch.ones(READ_BYTES // 4)
    read = READ_BYTES / best_time(x.sum, 10) / 1e9
    print(json.dumps({"bf16_gemm_gflops": round(gflops, 1), "read_gb_per_s": round(read, 2)}))


if __name__ == "__main__":
    main()
