"""Several processes on one machine: the ranks of one model, and the replicas of several engines.

In the order in which to read them:

    parallel_runner     a runner whose steps run on all ranks
    ranks               starts, watches and stops the other ranks' processes
    rank_process        the main function of such a process
    wire                the frames between them
    replica             the devices, threads and memory of one of several engines
"""
