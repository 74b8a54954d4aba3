"""Images of requests: parsed, fetched, decoded in child processes and cut into tiles.

Read in this order:

    settings        the limits, and the errors
    loader          from the URLs of one request to their tiles
    sources         parses a URL: data, http or https
    header          format and size, from an image's first bytes
    fetch           downloads over http(s)
    names           looks up host names: time limit, fair shares, memory of failures
    addresses       which addresses a download may connect to
    tile_cache      decoded tiles, of recent and of open requests; one decoding for all that wait
    decoders        the pool of decoder processes
    decoder_frames  the messages between the pool and its processes
    decoder_child   the decoder process: limits on memory and time
    decoding        what that process does with one image
    tiling          resize, pad and split, as Mllama's processor does

A decoder process may crash or be killed at any time: it costs one image, never the worker.
"""
