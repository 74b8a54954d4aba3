"""The engine's process: what a standby process has imported before it gets its settings."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from vlmserve.router.engine.process import import_model_runner
assert "torch" not in sys.modules
import_model_runner()
assert "torch" in sys.modules and "transformers" in sys.modules
"""


def test_a_standby_process_imports_the_model_s_libraries_before_its_settings_arrive():
    """Regression: a move lost the import, so a standby engine saved no time."""
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=300)
