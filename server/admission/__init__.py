"""Access to the bounded resources of a worker.

Read in this order:

    fair_lane        places that keys share: one line a key, bounded in number and in time
    lanes            which work of a worker has a lane, and how many places
    bytes_in_flight  the bytes of bodies and downloads that open requests keep, shared by keys
    key_file         the API keys, and what each may do
    rate_limits      requests and tokens a minute of each key
    worker_memory    no admission while the worker uses too much memory
"""
