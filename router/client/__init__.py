"""The HTTP worker's side of the engines. Imported by `server/`; never imports torch.

In the order in which to read the files:

    engine_client       one connection to one engine: requests out, tokens in
    request_stream      what came for one call and is not read yet
    image_sender        the tiles that the engine asks for, in pieces
    reconnect_pause     how long it waits before it connects again
    adapter_calls       loading and unloading adapters on a connection
    replica_pool        several engines with the interface of one; retries on another engine
    replica_chooser     which engine gets a request: by load, and by what it has cached
"""
