"""Reads a Dockerfile and a .dockerignore as far as this project's need it.

Knows the instructions and their exec form; no heredocs, no escape directive.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True, frozen=True)
class Instruction:
    """One instruction: its name in capitals, and what follows it on one line."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The exec form's words; raises ValueError for the shell form."""
        words: list[str] = json.loads(self.value)
        return words


@dataclass(slots=True)
class Stage:
    """The instructions from one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [one for one in self.instructions if one.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]

    def settings(self, name: str) -> dict[str, str]:
        """The pairs of all ENV or ARG instructions."""
        pairs = (shlex.split(one.value, posix=True) for one in self.all(name))
        return dict(pair.split("=", 1) for words in pairs for pair in words if "=" in pair)


def read_dockerfile(path: Path) -> list[Stage]:
    """The stages in order; raises ValueError for a line that is no instruction."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", path.read_text("utf-8")))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([A-Z]+)\s+(.+)", line)
        if match is None:
            raise ValueError(f"{path}: no instruction: {line!r}")
        if match[1] == "FROM":
            base, _, name = match[2].partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].instructions.append(Instruction(match[1], match[2]))
    return stages


def health_command(stage: Stage) -> list[str]:
    """The words of HEALTHCHECK's CMD."""
    words: list[str] = json.loads(stage.last("HEALTHCHECK").value.partition("CMD ")[2])
    return words


def is_ignored(name: str, ignore_file: Path) -> bool:
    """Whether .dockerignore keeps a path out of the build context.

    Patterns hold for the root, and for any folder where they start with **/; a pattern that names
    a folder takes what lies in it.
    """
    parts = name.split("/")
    for line in ignore_file.read_text("utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("!"):
            raise ValueError("exceptions are not understood here")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern.startswith("**/"):
            heads = parts
        if any(_matches(head, pattern.removeprefix("**/")) for head in heads):
            return True
    return False


def _matches(head: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), head) is not None
