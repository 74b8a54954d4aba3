"""One generation, from a request in any API's form to its answers.

Read in this order:

    request            the one form that every API's request becomes, and its checks
    preparer           checks a request; builds the engine's request: prompts, grammar, images
    prompt_errors      what a client gets where a conversation does not become a prompt
    generator          sends it to the engine and returns events
    events             the events: pieces of text and of calls, finishes, usage
    answer_stream      the engine's outputs as events, for one choice
    detokenizer        tokens as text: half characters and stop strings
    tool_calls         finds calls in the text
    token_text         single tokens and their log-probabilities
    completion         all events of a request, joined
    deadlines          the time limit of a request
    engine_connection  the connection to an engine, and how it is renewed

Knows nothing of HTTP or of an API's form.
"""
