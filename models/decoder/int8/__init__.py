"""Weight-only int8: one byte a weight and one scale an output channel.

Owns the quantizer, the layer and its kernels. Knows nothing of Mllama, of files or of which layers
are quantized.
"""
