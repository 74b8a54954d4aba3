"""Runs one step of the model.

Read runner.py first. device_health.py checks after a failed step whether the device still works;
graphs/ replays decode steps as recorded CUDA graphs.
"""
