"""Questions about a scene, each with its only right answer.

The answer depends on the scene and the question, never on the wording, so that a trained model can
be sure of it.

    asked = ask(scene, "colour", rng)    # a Question, or None if the scene does not allow the type
    asked.text, asked.answer             # "What colour is the circle?", "The circle is red."
    questions(scene, rng)                # one of every type that the scene allows
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..pictures import BACKGROUNDS, COLOURS, KINDS, Scene

NUMBERS = ("no", "one", "two", "three", "four")
CANNOT_READ = "I cannot read numbers or text."


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one of TYPES in some wording, and the exact answer."""

    type: str
    text: str
    answer: str


@functools.cache
def wordings(text: str) -> tuple[str, ...]:
    """The wordings in a text, separated by "|"; line breaks count as spaces."""
    return tuple(" ".join(wording.split()) for wording in text.split("|"))


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Question | None:
    """A question of the type in a random wording; None if the scene does not allow the type.

    Raises KeyError for a type that is not one of TYPES.
    """
    plain = _MAKERS[question_type](scene, rng)
    if plain is None:
        return None
    texts, answer = plain
    return Question(question_type, reword(str(rng.choice(texts)), rng), answer)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every type that the scene allows, in the order of TYPES."""
    asked = (ask(scene, question_type, rng) for question_type in TYPES)
    return [question for question in asked if question is not None]


def reword(text: str, rng: np.random.Generator) -> str:
    """The same question with small changes: spelling, a polite word, case, punctuation."""
    if rng.random() < 0.5:
        text = text.replace("colour", "color")
    if "picture" in text and rng.random() < 0.5:
        text = text.replace("picture", str(rng.choice(("image", "photo", "image"))))
    if rng.random() < 0.08:
        text = str(rng.choice(("Please tell me: ", "Tell me: ", "Look at the picture. "))) + text
    elif rng.random() < 0.06 and text[-1] in "?.":
        text = text.rstrip("?.") + ", please" + text[-1]
    if rng.random() < 0.06:
        text = text.rstrip("?.")
    return text.lower() if rng.random() < 0.08 else text


def describe(scene: Scene) -> str:
    """The canonical description; shapes are sorted by kind, then by colour."""
    on = f"on {_a(scene.background)} background."
    looks = sorted((shape.kind, shape.colour) for shape in scene.shapes)
    if not looks:
        return f"There are no shapes {on}"
    return f"{_there_are([(f'{colour} {kind}', kind) for kind, colour in looks])} {on}"


Plain = tuple[tuple[str, ...], str] | None  # the wordings and the answer


def _describe(scene: Scene, rng: np.random.Generator) -> Plain:
    return wordings(
        """What is in this image? | What is in this picture? | What is in the picture? | What's in
        this picture? | What do you see? | What can you see in the picture? | What does this
        picture show? | What is this? | Describe the picture. | Describe this picture. |
        Describe what you see. | Please describe the picture. | Can you describe this picture?"""
    ), describe(scene)


def _colour(scene: Scene, rng: np.random.Generator) -> Plain:
    """The colour of the only shape of its kind, or of the only shape; rarely of an absent one."""
    if len(scene.shapes) == 1 and rng.random() < 0.25:
        return wordings(
            """What colour is the shape? | What colour is it? | What is the colour of the shape? |
            Which colour does the shape have?"""
        ), f"The shape is {scene.shapes[0].colour}."
    kind = _pick(rng, KINDS, lambda kind: len(scene.of_kind(kind)) == 1)
    if kind is None:
        return None
    return _colour_wordings(kind), f"The {kind} is {scene.of_kind(kind)[0].colour}."


def _absent(scene: Scene, rng: np.random.Generator) -> Plain:
    """The colour of a kind, or the shape of a colour, that the picture does not show."""
    if rng.random() < 0.5:
        kind = _pick(rng, KINDS, lambda kind: not scene.of_kind(kind))
        return (_colour_wordings(kind), f"There is no {kind}.") if kind else None
    colour = _pick(rng, COLOURS, lambda colour: not scene.of_colour(colour))
    return (_shape_wordings(colour), f"There is no {colour} shape.") if colour else None


def _shape(scene: Scene, rng: np.random.Generator) -> Plain:
    """The kind of the only shape of its colour, or of the only shape."""
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        return wordings(
            """What shape is it? | What shape is this? | What shape is in the picture? | Which
            shape is in the picture? | Which shape do you see? | What kind of shape is it? |
            What is the shape?"""
        ), f"The shape is a {scene.shapes[0].kind}."
    colour = _pick(rng, COLOURS, lambda colour: len(scene.of_colour(colour)) == 1)
    if colour is None:
        return None
    return _shape_wordings(colour), f"The {colour} shape is a {scene.of_colour(colour)[0].kind}."


def _background(scene: Scene, rng: np.random.Generator) -> Plain:
    return wordings(
        """What colour is the background? | What is the background colour? | What is the colour of
        the background? | Which colour is the background? | Which colour does the background
        have? | What background colour does the picture have? | What colour is the background of
        the picture?"""
    ), f"The background is {scene.background}."


def _count(scene: Scene, rng: np.random.Generator) -> Plain:
    return wordings(
        """How many shapes are there? | How many shapes are in the picture? | How many shapes are
        there in the picture? | How many shapes do you see? | How many shapes can you see? | How
        many shapes does the picture show? | How many shapes are shown? | Count the shapes. |
        What is the number of shapes?"""
    ), f"{_there_is_number(len(scene.shapes))}."


def _count_kind(scene: Scene, rng: np.random.Generator) -> Plain:
    """How many shapes of a kind; kinds in the picture are asked more often."""
    kinds = [kind for kind in KINDS if scene.of_kind(kind)] if rng.random() < 0.65 else KINDS
    kind = str(rng.choice(kinds or KINDS))
    return wordings(
        f"""How many {kind}s are there? | How many {kind}s are in the picture? | How many {kind}s do
        you see? | How many {kind}s can you see? | Count the {kind}s."""
    ), f"{_there_is_number(len(scene.of_kind(kind)), kind)}."


def _list(scene: Scene, rng: np.random.Generator) -> Plain:
    kinds = sorted(shape.kind for shape in scene.shapes)
    answer = f"{_there_are([(kind, kind) for kind in kinds])}." if kinds else "There are no shapes."
    return wordings(
        """What shapes are there? | Which shapes are there? | What shapes are in the picture? |
        Which shapes are in the picture? | What shapes do you see? | Which shapes can you see? |
        List the shapes. | Name the shapes."""
    ), answer


def _is_there(scene: Scene, rng: np.random.Generator) -> Plain:
    """Yes or no, evenly: is there a kind, or a coloured kind; many of the noes are near misses."""
    is_yes = rng.random() < 0.5
    with_colour = rng.random() < 0.5
    things = sorted({(s.colour if with_colour else "", s.kind) for s in scene.shapes})
    if is_yes and not things:
        return None
    if is_yes:
        colour, kind = things[int(rng.integers(len(things)))]
    else:
        colour, kind = _missing(scene, rng, with_colour)
        if not kind:
            return None
    name = f"{colour} {kind}".strip()
    answer = f"Yes, there is {_a(name)}." if is_yes else f"No, there is no {name}."
    return wordings(
        f"""Is there {_a(name)}? | Is there {_a(name)} in the picture? | Do you see {_a(name)}? |
        Can you see {_a(name)}? | Does the picture show {_a(name)}?"""
    ), answer


def _is_it(scene: Scene, rng: np.random.Generator) -> Plain:
    """Yes or no, evenly: is the background, or the only shape of a kind, of a colour."""
    kind = _pick(rng, KINDS, lambda kind: len(scene.of_kind(kind)) == 1)
    if kind is None or rng.random() < 0.25:
        thing, true, choices = "background", scene.background, BACKGROUNDS
    else:
        thing, true, choices = kind, scene.of_kind(kind)[0].colour, COLOURS
    others = [colour for colour in choices if colour != true]
    said = true if rng.random() < 0.5 else str(rng.choice(others))
    answer = f"{'Yes' if said == true else 'No'}, the {thing} is {true}."
    return (f"Is the {thing} {said}?", f"Is the colour of the {thing} {said}?"), answer


def _read(scene: Scene, rng: np.random.Generator) -> Plain:
    return READING, CANNOT_READ


READING = wordings(
    """What number is in the picture? | What number do you see? | Which number is shown? | Which
    number is this? | What does the text say? | What is written in the picture? | What word is
    in the picture? | Read the text. | Read the number. | Can you read the text? | Can you read
    numbers? | Can you read?"""
)

_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Plain]] = {
    "describe": _describe,
    "colour": _colour,
    "shape": _shape,
    "background": _background,
    "count": _count,
    "count_kind": _count_kind,
    "list": _list,
    "is_there": _is_there,
    "is_it": _is_it,
    "absent": _absent,
    "read": _read,
}
TYPES = tuple(_MAKERS)


def _colour_wordings(kind: str) -> tuple[str, ...]:
    return wordings(
        f"""What colour is the {kind}? | What is the colour of the {kind}? | Which colour is the
        {kind}? | Which colour does the {kind} have? | What colour is the {kind} in the picture?"""
    )


def _shape_wordings(colour: str) -> tuple[str, ...]:
    return wordings(
        f"""What shape is the {colour} one? | What shape is {colour}? | Which shape is {colour}? |
        What is the {colour} shape? | What kind of shape is the {colour} one? | What {colour}
        shape is there?"""
    )


def _pick(
    rng: np.random.Generator, choices: tuple[str, ...], is_fit: Callable[[str], bool]
) -> str | None:
    """One of the choices that fit, each as likely; None if no choice fits."""
    fit = [choice for choice in choices if is_fit(choice)]
    return str(rng.choice(fit)) if fit else None


def _missing(scene: Scene, rng: np.random.Generator, with_colour: bool) -> tuple[str, str]:
    """A missing (colour, kind); colour is "" unless with_colour; ("", "") if nothing is missing."""
    there = {(s.colour, s.kind) for s in scene.shapes}
    if not with_colour:
        return "", _pick(rng, KINDS, lambda kind: not scene.of_kind(kind)) or ""
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in there]
    near = [pair for pair in pairs if scene.of_kind(pair[1]) or scene.of_colour(pair[0])]
    choices = near if near and rng.random() < 0.6 else pairs
    return choices[int(rng.integers(len(choices)))]


def _there_are(things: list[tuple[str, str]]) -> str:
    """'There is a red circle and a blue star' of sorted (name, noun); equal names are counted."""
    parts: list[str] = []
    for name in dict.fromkeys(name for name, _ in things):
        number = sum(name == other for other, _ in things)
        parts.append(_a(name) if number == 1 else f"{NUMBERS[number]} {name}s")
    verb = "is" if parts[0].startswith("a") else "are"
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"There {verb} {listed}"


def _there_is_number(number: int, noun: str = "shape") -> str:
    """'There is one circle', 'There are two circles', 'There are no circles'."""
    return f"There is one {noun}" if number == 1 else f"There are {NUMBERS[number]} {noun}s"


def _a(name: str) -> str:
    """The name with its article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
