"""What every process of the server shares.

In the order in which to read the files:

    logs            how a process writes its log
    log_stream      where the lines go, and that a full disk or a slow reader stops nothing
    memory_folder   a private folder in memory for one server
    parent_death    a process ends with the process that started it
    tasks           cancelling asyncio tasks, and raising their failures
    wire            frames on the socket between HTTP workers and the engine
"""
