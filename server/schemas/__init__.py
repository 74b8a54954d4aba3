"""The JSON of requests and answers, as types.

Read in this order:

    json_text                   what a body's text may hold, before it is decoded
    decoding, lenient           a body as a schema's object, or an error; unknown fields
    openai, llama_stack         the requests and answers of each API
    sampling, structured, tools the fields that these share
    rules                       conditions between fields, for the API's document
    answer_parts, ..._answers   the parts that answers share; answers of other routes

Each request becomes a `GenerationRequest`. Knows nothing of HTTP.
"""
