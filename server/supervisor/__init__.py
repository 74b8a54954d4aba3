"""The supervisor: starts engines and HTTP workers, detects hung ones, restarts and stops them.

In reading order: `settings.py` (timeouts and restarts, with the options), `child_states.py` (the
table of a child's states), `supervisor.py` (applies it), `child_slot.py` and `child.py` (one
process), `standby_engine.py`, `watchdog.py` with `engine_watchdog.py` and `worker_liveness.py` (is
a child hung?), `restart_budget.py`, `restart_counter.py`, `readiness_probe.py` and
`ended_metrics.py` (the files with the workers' metrics).
"""
