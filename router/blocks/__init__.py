"""The state of each cache block, by number only: free, used or cached.

In the order in which to read the files:

    contract        what every pool does and guarantees, on one page
    block_pool      numbered blocks, each free, used or cached
    text_pool       text blocks, shared by sequences with the same beginning
    prefix_lookup   what the pool has of a prompt that waits, kept up to date
    prefix_keys     the key under which a full text block is found again
    image_pool      image blocks, shared by requests with the same image
    image_files     encoded images as files in memory, outside the engine's process
    tile_store      the tiles of images that are not encoded yet, asked from the workers
    visibility      which image blocks each token of a chunk sees
    adapter_places  which adapters may run at once, counted alike

The tensors behind the numbers are in `models/kv_cache`.
"""
