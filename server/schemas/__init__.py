"""The JSON of requests and answers, as types.

Read in this order:

    json_text                        checks of a body's text, before it is decoded
    decoding, lenient                a body as a schema's object, or an error; unknown fields
    allowed_values                   what a field takes, for the errors about it
    foreign                          fields of other servers that change nothing here
    openai, llama_stack, anthropic   the requests and answers of each API
    moderation                       those of POST /v1/moderations
    sampling, structured, tools      the fields that these share
    rules                            conditions between fields, for the API's document
    json_parts                       JSON that is encoded and sent in parts
    streamed_answers                 what a stream needs of each API's answers
    model_answers, service_answers   the answers of the other routes

Each request becomes a `GenerationRequest`. Knows nothing of HTTP.
"""
