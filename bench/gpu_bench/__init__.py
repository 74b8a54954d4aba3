"""The parts of `bench/gpu.py`.

`run.py` and what it imports need nothing but the standard library: they watch processes of their
own, so that a kernel that kills or hangs one costs its row alone.
"""
