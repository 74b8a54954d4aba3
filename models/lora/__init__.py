"""LoRA adapters: low-rank changes of a model's linear layers, several in one step.

In the order in which to read them:

    files      an adapter's two files and the digest that identifies them; no torch
    config     adapter_config.json: ranks and scales, and what is refused; no torch
    sites      the products of a model that adapters can change
    limits     how many adapters, up to which rank, and the memory of their slots
    reader     the weights, checked against the sites, in host memory
    slots      device memory for the weights of several adapters, least recently used out
    rows       which rows of a step use which adapter, and the change of a product
    kernel_rows, lora_kernels    the same by Triton kernels, for several adapters on a GPU
    adapted    the decoder's operations and the vision model's modules with a step's adapters
    store      what a runner has read; a step's adapters into slots: `AdapterStore` is the way in
"""
