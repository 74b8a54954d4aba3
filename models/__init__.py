"""Computes tokens: the Mllama wrapper, attention, caches and sampling, with torch.

In the order in which to read them:

    batch, errors           what router/ sends for one step and gets back; the exceptions
    settings/               the runner's settings, and how a setting becomes an option
    create_runner           from the engine's options to a loaded runner
    execution/              one step: images and tokens in, sampled tokens out; recorded steps
    kv_cache/               the paged pools, their sizes, the layout of a step's inputs
    attention/, kernels/    attention over the pools; what all Triton kernels share
    decoder/, vision/       the text model's and the vision model's layers
    lora/                   adapters: low-rank changes of a model's layers, several in one step
    sampling/, grammar      from logits to a token; which tokens a grammar allows
    weights/, checkpoint    a checkpoint's files, the loader, quantization, device maps
    memory/                 estimates, measures and divides each device's memory
    tensor_parallel/        how a model is cut over ranks, and their collectives
    distributed/            the ranks' processes; what one of several engines uses
    bundled/                the tiny model that comes with the server

device_copies, eos_tokens and malloc are small helpers.
"""
