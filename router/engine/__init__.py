"""The engine process: a socket, and one loop that computes steps for the requests it receives.

In the order in which to read the files:

    process             the process: settings from stdin, signals, exit codes
    server              its Unix socket: workers connect, heartbeats go out
    engine              its loop: requests in, steps computed, messages out
    gate                which requests may wait for a place
    insertions          steps inside the running one, between its layers
    runner_protocol     what it expects of the code that computes a step
    grammar_compiler    the thread that compiles grammars
    adapter_loader      the thread that reads adapters, and which are in memory
    host_images         keeps encoded images in host memory, and reads them again
    reports             what an engine reports
    step_watchdog       how long the running step has made no progress
"""
