"""How computing threads wait for each other. Never imports torch, which reads it at import."""

from __future__ import annotations

import os

# GNU's runtime, which torch's CPU builds use, reads both
_SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_asleep() -> None:
    """Let threads sleep where they wait for each other; call it before torch is imported.

    A thread that spins keeps its core from HTTP, image decoding and whatever else runs, and then
    waits for its own partner whom they displaced. The user's word in the environment stands.
    """
    if not any(name in os.environ for name in _SAID_BY_USER):
        os.environ["OMP_WAIT_POLICY"] = "passive"
