"""Finds tool calls in what the model writes. Knows nothing of prompts, HTTP or any API's shape."""
