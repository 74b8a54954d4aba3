"""Decides whether a model fits, and divides each device's memory between weights, a step and pools.

In the order in which to read them:

    host_memory  how much memory the machine and its control groups leave; no torch
    available    how much memory a device has for this process
    estimate     bytes of the weights and of one step, by arithmetic
    fit          compares both before a weight is read, and gives advice
    fit_report   the tables of `vlmserve check`, as JSON
    peak_step    the largest step, measured on a GPU
    sizing       what is left becomes the pools
"""
