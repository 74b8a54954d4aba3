"""Settings, each declared once, with its type, default, bounds and command-line option.

Read `option.py` (how a field becomes an option), then `runner_config.py` (the runner's settings).
The engine's and the worker's settings are declared in the same way: router/config.py and
server/settings.py. Never imports torch.
"""
