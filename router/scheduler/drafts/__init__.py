"""Guesses of a request's next tokens, which the model verifies in one step.

In the order in which to read the files:

    token_index         where a text's last tokens came before
    draft_source        the drafts of one request, and how likely they are right
"""
