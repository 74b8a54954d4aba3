"""`python -m vlmserve.server`: the command line without its console script."""

from .cli.main import main

main()
