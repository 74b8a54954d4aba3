"""The text model's layers, in fewer and larger operations than transformers' own.

In the order in which to read them:

    mllama_fixes                         two corrections of transformers' Mllama
    decoder                              the layers, and a step through them; the layer count
    linear_products, packed_linear       products of linear layers that read the same states
    operations                           norms, rotation, gated MLP, sums: by torch or by Triton
    kernel_launch, fused_kernels         the Triton kernels of these operations
    int8/                                linear layers with int8 weights
    coded/                               linear layers with FP8, 8-bit and 4-bit weights in groups
    multi_device                         a model whose layers are on several devices
"""
