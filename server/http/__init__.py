"""HTTP/1.1 between the socket and the routes: reading requests strictly, keys, TLS, shutdown.

Read in this order:

    connection_states  the states of a connection, as a table
    connection_places  which connection is closed when there are too many
    head               the grammar and the limits of a request's head
    chunked            the chunked transfer coding of a body
    targets            other spellings of a path; the message of a 404
    answer_writer      writes answers: large bodies in parts, streams for HTTP/1.0
    protocol           one connection: reads requests through the three above, closes softly
    page_files         the files of the pages at / and /docs, which need no key
    auth               what a head must carry: host, API key, CORS, no compressed body
    sanic_config       Sanic's own settings
    tls                the certificate, and how it is reloaded
    drain              what a worker does from SIGTERM to its exit

Uses Sanic's parser behind its own checks. Knows nothing of routes, prompts or the engine.
"""
