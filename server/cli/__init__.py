"""The command line: parses options, builds all settings, opens the socket, runs the supervisor.

In reading order: `main.py` (the commands), `start_options.py` (options that belong to no other
settings), `build_settings.py` (from values to settings), `environment.py` (variables),
`model_source.py` (finds or downloads the model), `adapter_sources.py` (the same for adapters),
`check.py` (`vlmserve check`), `chat.py` and `chat_client.py` (`vlmserve chat`), `on_ray.py` (`serve
--ray`, imported only for it), `startup_checks.py`, `listener.py`, `byte_sizes.py`. Options are
declared on the fields of the settings classes; `models/settings/option_parser.py` builds the
command from them. Imports neither torch nor Sanic.
"""
