"""Settings, each declared once, with its type, default, bounds and command-line option.

Read `option.py` (how a field becomes an option), `runner_config.py` (the runner's settings), then
`option_parser.py` (makes command lines of such declarations). `byte_text.py` writes sizes for logs;
`threads.py` chooses how many threads compute. The engine's and the worker's settings are declared
in the same way: router/config.py and server/settings.py. Never imports torch.
"""
