"""The HTTP routes, one module for each group.

Read `chat` first: it has all steps of a request. Then `completions`, `responses`, `messages`,
`llama_stack`, `moderations`, `render` and `tokenization`; `health` and `service` describe the
server; `adapters` loads and unloads adapters; `pages` serves the playground and the API's document;
`samples` are the examples in it.
"""
