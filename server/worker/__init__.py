"""One HTTP worker.

In the order in which to read the files:

    process     the process: its settings, its socket, its event loop, its end
    app         the Sanic application, and what each request shares
"""
