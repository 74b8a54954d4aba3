"""The bundled model's answers in German: what the example adapter learns.

`german` translates each sentence that models/bundled/dataset/ can give as an answer.
"""

from __future__ import annotations

import re

# nouns of the shapes: gender and plural
_NOUNS = {
    "circle": ("Kreis", "m", "Kreise"),
    "square": ("Quadrat", "n", "Quadrate"),
    "star": ("Stern", "m", "Sterne"),
    "triangle": ("Dreieck", "n", "Dreiecke"),
    "shape": ("Form", "f", "Formen"),
}
_COLOURS = {
    "black": "schwarz", "blue": "blau", "green": "grün", "orange": "orange", "purple": "lila",
    "red": "rot", "white": "weiß", "yellow": "gelb", "gray": "grau",
}  # fmt: skip
_WITHOUT_ENDING = ("orange", "lila")
_NUMBERS = {"two": "zwei", "three": "drei", "four": "vier"}
_ARTICLES = {"m": ("der", "ein", "einen"), "n": ("das", "ein", "ein"), "f": ("die", "eine", "eine")}
# of an adjective after "ein" in the accusative
_ENDINGS = {"m": "en", "n": "es", "f": "e"}
_FIXED = {
    "There is no picture. Please send me one.": "Es gibt kein Bild. Bitte schick mir eins.",
    "I only know simple shapes and colours.": "Ich kenne nur einfache Formen und Farben.",
    "I am a tiny model for testing. I know simple shapes and colours.": (
        "Ich bin ein kleines Modell zum Testen. Ich kenne einfache Formen und Farben."
    ),
    "I can name the shapes, the colours and the background of a simple picture.": (
        "Ich kann die Formen, die Farben und den Hintergrund eines einfachen Bildes nennen."
    ),
    "I cannot read numbers or text.": "Ich kann keine Zahlen und keinen Text lesen.",
    "Hello! Send me a picture and ask me about it.": (
        "Hallo! Schick mir ein Bild und frag mich danach."
    ),
    "You are welcome.": "Gern geschehen.",
    "Goodbye!": "Auf Wiedersehen!",
}


def german(answer: str) -> str:
    """The answer in German. Raises ValueError for a sentence that the model does not give."""
    if answer in _FIXED:
        return _FIXED[answer]
    start, rest = re.fullmatch(r"(Yes, |No, |)(.*)\.", answer).groups() if answer else ("", "")
    word = {"Yes, ": "Ja, ", "No, ": "Nein, ", "": ""}[start]
    sentence = _there(rest) or _is(rest)
    if sentence is None:
        raise ValueError(f"no German for {answer!r}")
    return f"{word}{sentence if word else sentence[0].upper() + sentence[1:]}."


def _there(text: str) -> str | None:
    """'there is a red circle and two stars on a white background'."""
    match = re.fullmatch(r"[Tt]here (?:is|are) (.*?)(?: on an? (\w+) background)?", text)
    if match is None:
        return None
    things, background = match.groups()
    listed = " und ".join(_accusative(one) for one in things.split(" and ")[-1:])
    before = things.rpartition(" and ")[0]
    if before:
        listed = ", ".join(_accusative(one) for one in before.split(", ")) + f" und {listed}"
    on = f" auf {_adjective(background, 'em')} Hintergrund" if background else ""
    return f"es gibt {listed}{on}"


def _accusative(thing: str) -> str:
    """'a red circle', 'two circles', 'no shapes' after 'es gibt'."""
    count, *colours, noun = thing.split()
    colour = colours[0] if colours else None
    if count in _NUMBERS or (count == "no" and noun not in _NOUNS):
        number = _NUMBERS.get(count, "keine")
        plural = _NOUNS[noun.removesuffix("s")][2]
        adjective = f"{_adjective(colour, 'e')} " if colour else ""
        return f"{number} {adjective}{plural}"
    name, gender, _ = _NOUNS[noun]
    article = _ARTICLES[gender][2]
    adjective = f"{_adjective(colour, _ENDINGS[gender])} " if colour else ""
    return f"{'k' if count == 'no' else ''}{article} {adjective}{name}"


def _is(text: str) -> str | None:
    """'the circle is red', 'the blue shape is a star', 'the background is white'."""
    match = re.fullmatch(r"[Tt]he (?:(\w+) )?(\w+) is (?:(an?) )?(\w+)", text)
    if match is None:
        return None
    colour, noun, article, said = match.groups()
    name, gender = ("Hintergrund", "m") if noun == "background" else _NOUNS[noun][:2]
    adjective = f"{_adjective(colour, 'e')} " if colour else ""
    if article is None:
        return f"{_ARTICLES[gender][0]} {adjective}{name} ist {_COLOURS[said]}"
    other, other_gender, _ = _NOUNS[said]
    return f"{_ARTICLES[gender][0]} {adjective}{name} ist {_ARTICLES[other_gender][1]} {other}"


def _adjective(colour: str, ending: str) -> str:
    word = _COLOURS[colour]
    return word if word in _WITHOUT_ENDING else word + ending
