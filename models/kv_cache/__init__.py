"""The paged cache of keys and values, and the layout of a step's inputs.

In the order in which to read them:

    pool_sizes      how many blocks each pool gets
    paged_cache     the pools, and the cache and attention function for transformers
    image_copies    images between the pool and host memory
    block_table     a sequence's block ids as an array that grows with it
    step_inputs     a step's sequences as packed arrays: tokens, positions, slots, rows
    step_tensors    these on the device, by one copy, and the hidden states after them
"""
