"""Everything a client or operator sees: HTTP API, images, prompts, command line, supervisor.

In reading order: `cli/` (starts everything), `supervisor/` (runs the processes), `worker.py` and
`app.py` (one HTTP worker), `http/` (protocol and access), `routes/` with `schemas/` and `api/`
(requests and answers), `prompts/` and `images/` (from messages to model inputs), `generation/`
(from tokens to text), `structured_output/`, `telemetry/`, `bench/`. `settings.py` declares a
worker's settings. Imports the router's client side and the torch-free parts of models/ only.
"""
