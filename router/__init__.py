"""Which tokens run next: request queue, token-level batching, blocks, engine process.

In the order in which to read them:

    messages, wire, errors      what workers and the engine say to each other, and how
    client                      a worker's side: requests out, tokens in
    replica_pool, replicas      several engines behind that face, and which of them is asked
    config, engine_process      the engine's process: its settings, its life
    engine_server, engine       its socket; its loop: requests in, steps computed, messages out
    runner                      what it expects of whatever computes a step
    admission, queue, pace      what can never run, who waits, and for about how long
    grammar_jobs                grammars that are compiled meanwhile
    sequence, segments          one answer: its tokens, how far they are computed, what they see
    scheduler, step, rows       which tokens run in the next step, and as what
    block_manager               which blocks each sequence holds
    blocks, text_pool, prefix   the two pools, and what is found in them again
    step_watchdog                  whether the running step gets on
    logs, parent                what every process of the server does alike
"""
