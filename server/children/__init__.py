"""Child processes: what all killable children of a worker share, and a whole server as a child.

In the order in which to read the files:

    processes       how a child starts, what it inherits, and how it ends
    questions       how a child answers questions within limits of time and memory
    private_server  `vlmserve serve` as a child, for a batch run or a replica of Ray Serve
"""
