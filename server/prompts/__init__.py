"""From a conversation to token ids and image positions.

Read in this order:

    conversation   the one form of a conversation: roles, texts, images, calls
    processor      tokenizes texts and rendered conversations
    rendering      chooses the template or Meta's format, and knows why
    chat_template  renders a conversation with the checkpoint's template
    templates      finds templates, reads their form, runs them in bounds
    meta_format    renders in Meta's own format, where there is no template
    placeholders   keep the text of users apart from the text of a template
    tokenizer      the checkpoint's tokenizer, and encoding without special tokens
    text_slices    pieces of long texts, to refuse a hopeless prompt early

Knows nothing of HTTP, pixels or the engine.
"""
