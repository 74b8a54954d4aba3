"""Reads weights that a checkpoint stores in 8 or 4 bits.

Read recognition (what the headers store), then one module a format for its layouts and tensors:
compressed_tensors, bitsandbytes, gptq. Owns the formats' names and packings. Knows nothing of
devices, of modules or of how a coded weight is multiplied (models/decoder/coded/).
"""
