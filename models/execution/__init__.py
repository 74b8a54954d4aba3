"""Runs one step of the model.

Read runner.py first. step_checks.py checks a step's ids. warm_up.py launches every kernel once at
start. device_health.py checks after a failed step whether the device still works; graphs/ replays
decode steps as recorded CUDA graphs.
next_pass.py starts the next step before it is asked for. transformers_pass.py computes models whose
layers are not fused. between_layers.py lets another step be computed inside a running one.
shared_cores.py chooses a CPU's threads for each step.
"""
