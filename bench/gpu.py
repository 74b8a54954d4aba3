"""Tests and measures the model on one GPU: the tests marked `gpu`, then tables of steps.

    python bench/gpu.py                          # or: make bench-gpu
    python bench/gpu.py --budget-s 300 --out runs/h100
    python bench/gpu.py --tiny                   # a rehearsal on a CPU: no figure counts

Needs Python 3.12, torch, transformers, accelerate and triton, and nothing from a network: what else
is imported comes from a folder of wheels (`make bench-gpu-wheels`, where there is a network). The
weights are random, of Llama-3.2-11B-Vision's shape, drawn on the device. Every row is printed and
saved as soon as it is measured; what the budget has no time for is dropped and named. The last line
of stdout is one JSON document, which docs/benchmarks.md explains.
"""

import sys

from gpu_bench.run import main

if __name__ == "__main__":
    sys.exit(main())
