"""A process that renders chat templates, within limits of time and memory.

Its questions and answers are JSON, in the frames of `server/children/questions.py`. Owns the
rendering. Knows nothing of requests. Template and variables come with each question.
"""

from __future__ import annotations

import datetime
import functools
import sys
from typing import Any

import msgspec
from jinja2 import Template

from ....router.processes.parent_death import die_with_parent
from ...children.questions import answer_questions
from .environment import make_environment, reason_of, render

MAX_MEMORY_BYTES = 1 << 30
TOO_MUCH_MEMORY = "the template takes too much memory"


class Question(msgspec.Struct, frozen=True):
    """What to render: a template with each of the variables.

    now: the time that the template may ask for, in ISO's form. nonce: that of placeholders in the
    variables.
    """

    source: str
    now: str
    nonce: str
    variables: list[dict[str, Any]]
    max_chars: int


class Rendered(msgspec.Struct, frozen=True):
    """One rendering. Exactly one is set: the text, or the reason against it."""

    text: str | None = None
    error: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The renderings, in the order of the variables; or why the template does not compile."""

    renderings: list[Rendered] = []
    error: str | None = None


class Clock:
    """The time that templates see."""

    def __init__(self) -> None:
        self.now = datetime.datetime.now()

    def read(self) -> datetime.datetime:
        """The time that was set last."""
        return self.now


@functools.lru_cache(4)
def _compiled(source: str, nonce: str, clock: Clock) -> Template:
    return make_environment(clock.read, nonce).from_string(source)


def answer(question: Question, clock: Clock) -> Answer:
    """Everything that is asked for."""
    clock.now = datetime.datetime.fromisoformat(question.now)
    try:
        template = _compiled(question.source, question.nonce, clock)
    except MemoryError:
        return Answer(error=TOO_MUCH_MEMORY)
    except Exception as error:
        return Answer(error=reason_of(error))
    return Answer([_rendered(template, one, question.max_chars) for one in question.variables])


def _rendered(template: Template, variables: dict[str, Any], max_chars: int) -> Rendered:
    try:
        return Rendered(render(template, variables, max_chars))
    except MemoryError:
        return Rendered(error=TOO_MUCH_MEMORY)
    except Exception as error:
        # A template is a program of the checkpoint's: it may fail in any way.
        return Rendered(error=reason_of(error))


def main() -> None:
    """Answer until stdin ends."""
    die_with_parent(int(sys.argv[1]))
    clock = Clock()
    answer_questions(
        lambda content: msgspec.json.decode(content, type=Question),
        lambda question: answer(question, clock),
        Answer(),
        MAX_MEMORY_BYTES,
    )


if __name__ == "__main__":
    main()
