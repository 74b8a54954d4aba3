"""The bundled model: a tiny Mllama for trying and testing the server.

Knows where its checkpoint lies; imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
