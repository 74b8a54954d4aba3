"""Finds tool calls in the text of an answer while the model writes it.

Read in this order:

    parser            the forms of calls, and what may still become a call
    pieces            the pieces that the parser returns
    python_arguments  arguments in Python's notation as JSON

Knows nothing of prompts, HTTP or an API's form.
"""
