"""Llama Stack's API, for every line of its clients.

Read in this order: `requests`, `tools` (tools and calls in requests), `answers`.
"""
