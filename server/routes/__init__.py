"""The HTTP routes, one module for each group.

Read `chat` first: it has all steps of a request. Then `completions`, `responses`, `messages`,
`llama_stack`, `moderations`, `render` and `tokenization`; `health`, `service` and `model_card`
describe the server; `docs` serves the API's document; `samples` are the examples in it.
"""
