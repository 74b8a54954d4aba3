"""Decode steps recorded once and replayed: one launch for a step's hundreds of kernels.

Owns which steps are recorded, the memory that a replay reads, and CUDA's graphs. Knows nothing of
requests, and of the decoder only how it is called.
"""
