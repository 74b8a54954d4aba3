"""How a checkpoint's files store its weights, in 16 and 32 bits or in 8 and 4.

In the order in which to read them:

    safetensors_headers      names, shapes and sizes of the stored tensors
    recognition              which form they have; `read_weights` is the way in
    coded_tensor             a weight whose file has several tensors for it
    compressed_tensors       FP8, W8A8, W4A16, W8A16
    bitsandbytes             NF4, FP4 and 8 bits
    gptq                     the packings of GPTQ, auto-round and AWQ
    packing                  codes in and out of words; the only module that imports torch

Knows nothing of devices, of modules or of how a coded weight is multiplied (models/decoder/coded/).
"""
