"""Which tokens run next: request queue, token-level batching, cache blocks, engine process.

In the order in which to read it:

    messages, errors            the protocol between HTTP workers and engines
    processes/                  its frames; the log and the end of every process
    client/                     a worker's side: requests out, tokens in
    config                      the engine's settings
    engine/                     the engine's process, its socket, its loop
    scheduler/                  the request queue, and which tokens run in the next step
    blocks/                     the two pools of cache blocks, and what is found in them again
    state_table                 how everything with states changes them
    fair_shares                 the order of waiting work of several keys
"""
