"""What all routes share.

Read in this order:

    endpoint        how a route declares its request and its answers
    services        the parts of a worker that routes use, and JSON answers
    error_answers   the answer to any exception
    ignored_fields  reports fields of a request that the server dropped
    answer_headers  names the replica and the images of an answer
    response_store  responses that are kept for /v1/responses
    whole_answer    answers that are not streamed, sent in parts
    sse             streams of server-sent events
    openapi         the API's document, from the declarations
    pages           the files of the pages at / and /docs

Declares no route.
"""
