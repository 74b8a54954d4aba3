"""`vlmserve bench`: offers a load to an OpenAI-compatible server and measures what a client sees.

Knows nothing of this project's server or engine: only HTTP, as any client does.
"""
