"""The chat templates of checkpoints: where they are, what they read, and running them in bounds.

Read in this order:

    sources         finds a checkpoint's templates, in the order in which transformers looks
    environment     jinja's sandbox, set up as transformers sets it up
    content_format  whether a template reads a content as a string or as a list of parts
    plain           whether a template's work is bounded, so that it may run in the worker
    child           a process that renders any template, within limits of time and memory
    processes       those children, seen from the worker

Knows nothing of conversations or tokens: a template gets a dict and gives a text.
"""
