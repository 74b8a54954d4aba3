"""Held-out questions for the bundled model, and the scores of its answers.

Imports no torch: a grader (grading.py) or a client (client.py) gets the answers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..dataset.questions import TYPES, Question, ask, questions
from ..dataset.small_talk import NO_PICTURE, SYSTEM, talk
from ..pictures import Scene, draw, encode, random_scene, random_size

# far from the training seeds, which are small numbers
_HELD_OUT = 20_231_123
SIZES = ((224, 224), (300, 200), (512, 512), (200, 300), (400, 400), (480, 300))
TEXT_ONLY = ("small_talk", "no_picture")


@dataclass(frozen=True, slots=True)
class Item:
    """One question. scene, picture: None without a picture; image_format: of the sent file;
    history: earlier questions about the same picture, with right answers."""

    type: str
    text: str
    answer: str
    scene: Scene | None = None
    picture: Image.Image | None = None
    image_format: str = "PNG"
    is_image_first: bool = True
    system: str | None = None
    history: tuple[Question, ...] = ()

    @property
    def turns(self) -> list[tuple[str, str]]:
        """All questions with their right answers, this one last."""
        before = [(question.text, question.answer) for question in self.history]
        return [*before, (self.text, self.answer)]

    @property
    def num_shapes(self) -> int | None:
        """How many shapes the picture shows; None without a picture."""
        return None if self.scene is None else len(self.scene.shapes)

    def picture_bytes(self) -> bytes:
        """The picture's file."""
        if self.picture is None:
            raise ValueError(f"the item {self.text!r} has no picture")
        return encode(self.picture, self.image_format)


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to an item; probability: of the right answer at temperature 1, if known."""

    item: Item
    is_right: bool
    answer: str = ""
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a group; baseline: of always giving the group's commonest answer."""

    name: str
    num: int
    right: float
    baseline: float
    probability: float | None


def exam(num_pictures: int, seed: int = 0, shapes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> list[Item]:
    """Every allowed question type about `num_pictures` held-out pictures for each number of shapes,
    and as many questions without a picture."""
    rng = np.random.default_rng((_HELD_OUT, seed))
    items: list[Item] = []
    for num_shapes in shapes:
        for index in range(num_pictures):
            items += _items_about(rng, num_shapes, index)
    for _ in range(num_pictures):
        items += _items_without_picture(rng)
    return items


def score(results: list[Result], name: str) -> Score:
    """The score of a group; NaN where it is empty."""
    answers = Counter(result.item.answer for result in results)
    num = len(results)
    known = [r.probability for r in results if r.probability is not None]
    return Score(
        name,
        num,
        sum(result.is_right for result in results) / num if num else float("nan"),
        max(answers.values()) / num if num else float("nan"),
        sum(known) / len(known) if known else None,
    )


def scores(results: list[Result]) -> list[Score]:
    """A score for each question type, whole and by number of shapes, then by form of the request.

    For one number of shapes a constant answer to "how many" is right, so read the baseline of
    counting from the whole.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=_order):
        item = result.item
        groups[item.type].append(result)
        if item.num_shapes is not None:
            groups[f"{item.type}, {_number_of_shapes(item.num_shapes)}"].append(result)
    for result in results:
        if result.item.num_shapes in (1, 2):
            for form in _forms(result.item):
                groups[f"{form}, 1 or 2 shapes"].append(result)
    return [score(group, name) for name, group in groups.items()]


def table(columns: dict[str, list[Score]]) -> str:
    """A Markdown table with a column of right answers for each way of asking the same exam.

    The probability at temperature 1 is a column of its own where a grader knows it.
    """
    first = next(iter(columns.values()))
    shares = {name: [row.right for row in rows] for name, rows in columns.items()}
    known = [row.probability for row in first if row.probability is not None]
    if len(known) == len(first):
        shares["expected at temperature 1"] = known
    shares["most frequent answer"] = [row.baseline for row in first]
    lines = [
        f"| questions | number | {' | '.join(shares)} |",
        f"|---|{'---:|' * (1 + len(shares))}",
    ]
    for index, row in enumerate(first):
        cells = [f"{column[index]:.1%}" for column in shares.values()]
        lines.append(f"| {row.name} | {row.num} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _items_about(rng: np.random.Generator, num_shapes: int, index: int) -> list[Item]:
    """One item of each type that a random scene allows."""
    size = SIZES[index % len(SIZES)] if index % 3 else random_size(rng)
    scene = random_scene(rng, num_shapes, size)
    picture = draw(scene)
    items = []
    for question_type in TYPES:
        question = ask(scene, question_type, rng)
        if question is None:
            continue
        item = Item(
            question_type,
            question.text,
            question.answer,
            scene,
            picture,
            image_format="JPEG" if index % 4 == 3 else "PNG",
            is_image_first=bool(rng.random() < 0.5),
            system=str(rng.choice(SYSTEM)) if rng.random() < 0.2 else None,
            history=_history(rng, scene) if rng.random() < 0.2 else (),
        )
        items.append(item)
    return items


def _history(rng: np.random.Generator, scene: Scene) -> tuple[Question, ...]:
    """One to four questions about the scene."""
    asked = questions(scene, rng)
    picked = rng.choice(len(asked), int(rng.integers(1, 5)), replace=False)
    return tuple(asked[int(index)] for index in picked)


def _items_without_picture(rng: np.random.Generator) -> list[Item]:
    """One item of small talk, and one question about a missing picture."""
    system = str(rng.choice(SYSTEM)) if rng.random() < 0.2 else None
    text, answer = talk(rng)
    types = [question_type for question_type in TYPES if question_type != "read"]
    question = None
    while question is None:
        question = ask(random_scene(rng), str(rng.choice(types)), rng)
    return [
        Item("small_talk", text, answer, system=system),
        Item("no_picture", question.text, NO_PICTURE, system=system),
    ]


def _number_of_shapes(number: int) -> str:
    return "1 shape" if number == 1 else f"{number} shapes"


def _forms(item: Item) -> list[str]:
    """The forms of request that the item's result counts for."""
    forms = ["image before the question" if item.is_image_first else "image after the question"]
    if item.system:
        forms.append("with a system message")
    if item.history:
        forms.append("as a later turn of a conversation")
    return [*forms, f"as {item.image_format}"]


def _order(result: Result) -> tuple[int, int]:
    """By question type, then by number of shapes."""
    names = (*TYPES, *TEXT_ONLY)
    return names.index(result.item.type), result.item.num_shapes or 0
