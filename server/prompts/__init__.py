"""From a conversation to token ids and image positions.

Read in this order:

    conversation   the one form of a conversation: roles, texts, images, calls
    processor      tokenizes texts and rendered conversations
    chat_template  renders a conversation with the checkpoint's template
    meta_format    renders what such a template cannot: Meta's own formats of tools
    placeholders   keep the text of users apart from the text of a template

Knows nothing of HTTP, pixels or the engine.
"""
