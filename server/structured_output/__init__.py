"""Grammars that an answer must match.

Read in this order:

    grammar_text       JSON schemas, regexes, choices and EBNF as the text of one grammar
    tool_call_grammar  the grammar of answers that must be tool calls
    compile_checks     whether a client's grammar compiles, in time
    compile_child      the process that compiles it, which can be killed
    plain_schema       a schema without the keywords that change nothing
    look_around        patterns without look-around, which no grammar has
    reasons            why a grammar does not compile, without the library's own terms
    regex_dialect      the dialect of regular expressions, whose classes are ASCII
    json_depth         how deeply JSON nests

Knows nothing of the fields of any API. The engine applies the grammars.
"""
