"""What all killable children of a worker share.

In the order in which to read the files:

    processes       how a child starts, what it inherits, and how it ends
    questions       how a child answers questions within limits of time and memory
"""
