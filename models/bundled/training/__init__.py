"""Trains the bundled model on one CPU core.

train.py is the command line and the loop; initial.py makes the untrained model, auxiliary.py the
vision encoder's second task.
"""
