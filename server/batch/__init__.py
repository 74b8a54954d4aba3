"""`vlmserve run-batch`: many requests from a file, or about a folder of pictures.

Read in this order:

    command          the command line
    requests         the lines of the input, or one for each picture; what is wrong with them
    results          the lines of the output; what an earlier run has already written
    runner           requests sent a few at a time, retried, written as they end
    private_server   a server of the run's own, if none is named
"""
