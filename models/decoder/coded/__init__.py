"""Linear layers whose weights stay in 8 or 4 bits: codes with a scale for each group of inputs.

Read layout (which codings there are and what they take), weight (decode), linear (the layer),
product and coded_kernels (the fused CUDA kernel). Knows nothing of Mllama or of files.
"""
