"""Guesses of a request's next tokens, which the model verifies in one step.

In the order in which to read the files:

    token_index         where a text's last tokens came before
    draft_length        how many drafts are worth their time: in a step, and of a request
    draft_source        the drafts of one request: from its grammar, or from its own text
"""
