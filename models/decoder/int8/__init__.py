"""Linear layers with int8 weights: one byte a weight and one scale an output channel.

In the order in which to read them:

    quantizer        rounds a weight to int8
    linear           the layer, and which product it uses for how many rows
    product          launches the Triton kernel for few rows
    int8_kernels     that kernel
"""
