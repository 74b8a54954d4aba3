"""The parts of `bench/gpu.py`. Read plan, run, child, measure, products, document,
verdict.

`run.py` and its imports need only the standard library. They watch child processes, so a kernel
that kills or hangs its process costs only its own row.
"""
