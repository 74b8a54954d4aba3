"""LoRA adapters as the HTTP side knows them: their names, and where they come from.

In the order in which to read the files:

    settings        the options
    requests        the bodies of requests that load and unload
    names           which names and paths the command line and clients may give
    registry        the served names, shared by all workers
    updates         loading and unloading while the server runs
    source          a folder that is watched
    adapters        a worker's part of all of these

The engine knows no names: a request has its adapter's folder and digest.
"""
