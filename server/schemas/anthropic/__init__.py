"""Anthropic's Messages API: what its clients send and read.

Read in this order:

    turns       the conversation: turns, content blocks, and the messages that they are
    requests    the body, and how it becomes a generation
    answers     the message, the events of a stream, the count of tokens, the form of an error
"""
