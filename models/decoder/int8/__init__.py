"""Linear layers with int8 weights: one byte a weight and one scale an output channel.

In the order in which to read them:

    quantizer        rounds a weight to int8
    linear           the layer, and which product it uses for how many rows
    dynamic          products on a CPU whose rows are rounded to int8 too
    product          launches the Triton kernel for few rows
    int8_kernels     that kernel
"""
