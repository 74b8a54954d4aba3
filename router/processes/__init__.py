"""What every process of the server shares.

In the order in which to read the files:

    logs            how a process writes its log
    parent_death    a process ends with the process that started it
    wire            frames on the socket between HTTP workers and the engine
"""
