"""Everything a client or operator sees: HTTP API, images, prompts, command line, supervisor.

In the order in which to read it:

    cli/                    starts everything
    settings                a worker's settings
    adapters/               LoRA adapters: names, files, updates
    supervisor/             starts, watches, restarts and stops the processes
    worker/                 one HTTP worker: its process, its Sanic application
    http/, admission/       protocol and keys; access to bounded resources
    routes/, api/           the endpoints; how they are declared and documented
    schemas/, errors        the JSON of requests, answers and errors
    prompts/, images/       from messages to model inputs
    generation/             from a request to the engine, and from tokens to text
    structured_output/      grammars for answers
    telemetry/              metrics, the request log, traces
    children/               what all killable children share; a whole server as a child
    bench/, batch/          the load generator; many requests from a file
    ray/                    the same server as an application of Ray Serve

Imports the router's client side and the torch-free parts of models/ only.
"""
