"""`vlmserve bench serve`: sends load to an OpenAI-compatible server and measures what clients see.

Uses HTTP only, like any client; knows nothing of the server. In reading order: `settings.py`
(what to run, with the options), `command.py` (the command line), `sweep.py` (level after level),
`load.py` and `runner.py` (requests and their schedule), `client.py` (one request over HTTP),
`summary.py` (figures), `report.py` and `plot.py` (tables and pictures), `compare.py` (two results).
"""
