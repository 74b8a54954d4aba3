"""A clock that a test sets, and what a watchdog judges as time passes."""

from __future__ import annotations


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def first_reason(watch, seconds, step_s=0.5):
    """When and why what is watched is taken to hang, if within `seconds`."""
    for number in range(int(seconds / step_s)):
        if reason := watch.judge(step_s):
            return number * step_s, reason
    return None
