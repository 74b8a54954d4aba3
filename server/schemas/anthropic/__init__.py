"""Anthropic's Messages API: what its clients send and read.

Read in this order:

    requests    the body, its turns and content blocks, and how they become a generation
    answers     the message, the events of a stream, the count of tokens, the form of an error
"""
