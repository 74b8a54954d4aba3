"""The bundled model: a tiny Mllama for trying and testing the server.

Read pictures.py (the scenes that it knows), then dataset/, training/ and exam/. This file only
names the checkpoint's folder, and imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
