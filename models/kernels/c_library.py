"""Compiles this project's C for the CPU that runs it, once, and loads it.

The compiled file stays in the user's cache folder, named after its source, the compiler and the
processor: a later start loads it in a millisecond. A build takes about four seconds. Where the
folder cannot be used, each start builds in a temporary one. Without a compiler there is no library,
and callers use torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# the types of the C's arguments
POINTER, SIZE, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_is_allowed = ContextVar("is_allowed", default=True)

COMPILERS = ("gcc", "cc")
FLAGS = ("-O2", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_S = 120
# Smaller models are not worth a compiler's seconds at their first start.
MIN_HIDDEN = 512
# what of /proc/cpuinfo names the instructions that -march=native may use
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features")


@contextmanager
def allowed(is_allowed: bool) -> Iterator[None]:
    """Whether what is created within the context may use the C."""
    token = _is_allowed.set(is_allowed)
    try:
        yield
    finally:
        _is_allowed.reset(token)


def is_allowed() -> bool:
    """Whether to use the C; see `allowed`."""
    return _is_allowed.get()


def is_worth_it(hidden: int) -> bool:
    """Whether to use the C in a model of this hidden size."""
    return hidden >= MIN_HIDDEN and is_allowed()


def load(source: Path, **arguments: Sequence[Any]) -> ctypes.CDLL | None:
    """The library of a C file; None, with a line in the log, if it cannot be built or loaded.

    arguments: the types of a function's arguments, by its name; such functions return nothing.
    """
    try:
        library = _load(source)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        reason = " ".join(str(detail).split())[:300]
        logger.info("%s is not used, torch computes instead: %s", source.name, reason)
        return None
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _load(source: Path) -> ctypes.CDLL:
    """The library. Raises OSError or SubprocessError with the reason if there is none."""
    compiler = _compiler()
    try:
        folder = _folder()
    except OSError as error:
        logger.info("%s is compiled at every start: %s", source.name, error)
        with tempfile.TemporaryDirectory() as temporary:  # a loaded file may be removed
            target = Path(temporary) / f"{source.stem}.so"
            _build(source, compiler, target)
            return ctypes.CDLL(str(target))
    target = folder / f"{source.stem}-{_key(source, compiler)}.so"
    if not target.exists():
        _build(source, compiler, target)
    return ctypes.CDLL(str(target))


def _build(source: Path, compiler: str, target: Path) -> None:
    # several processes may build at once: each renames its own whole file
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, str(source), "-o", name],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _compiler() -> str:
    """The compiler's path: of $CC, or GNU's, whose runtime for threads torch has loaded."""
    chosen = os.environ.get("CC")
    for name in (chosen,) if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    raise OSError("no C compiler was found (gcc)")


def _folder() -> Path:
    """The folder of compiled files. Raises OSError if only others, or others too, may write."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "vlmserve" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} belongs to another user, or others may write to it")
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is read-only")
    return folder


def _key(source: Path, compiler: str) -> str:
    """Names everything that decides the compiled file."""
    built = os.stat(compiler)
    headers = [one.read_text() for one in sorted(source.parent.glob("*.h"))]
    parts = [
        source.read_text(),
        *headers,
        " ".join(FLAGS),
        compiler,
        str(built.st_mtime_ns),
        _processor(),
    ]
    return hashlib.sha256("\n".join([*parts, torch.__version__]).encode()).hexdigest()[:24]


def _processor() -> str:
    """The first processor's model and instructions."""
    with open("/proc/cpuinfo") as lines:
        first = lines.read().split("\n\n", 1)[0]
    return "\n".join(line for line in first.split("\n") if line.startswith(_CPU_FIELDS))
