"""Linear layers whose weights stay in 8 or 4 bits: codes with a scale for each group of inputs.

In the order in which to read them:

    layout                   the codings and the bytes that they take; no torch
    weight                   a coded weight: decode, cut, join
    linear                   the layer, and which product it uses
    product, coded_kernels   the fused CUDA kernel of few rows

Knows nothing of Mllama or of files.
"""
