"""Records decode steps once as CUDA graphs and replays them: one launch instead of hundreds.

In the order in which to read them:

    eligibility     whether a model's steps can be recorded
    layout          where a step's inputs are in the buffer that a replay reads
    recorder        capture and replay of any computation
    decode          the recorded steps of a model
"""
