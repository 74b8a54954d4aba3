"""Builds what a load sends: pictures, prompts and request bodies.

A seed determines everything. All is drawn and encoded before the clock starts, so it costs no
measured time. Knows nothing of HTTP, clocks or arrival times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import orjson

from ...models.bundled.pictures import data_url, draw, random_scene
from .settings import Load, Size

QUESTION = "What is in this image?"
# Short, frequent words: one token each for most tokenizers.
FREQUENT = """
the of and to in is that it was for on are with as his they at be this from have or by one had not
but what all were when we there can an your which their said if do will each about how up out them
then she many some so these would other into has more her two like him see time could no make than
first been its who now people my made over did down only way find use may water long little very
after called just where most know
"""
WORDS = FREQUENT.split()
_NOISE_PIXELS = 8


def request_bodies(load: Load, model: str) -> list[bytes]:
    """Return the load's bodies as JSON; equal arguments give equal bytes."""
    pictures = _pictures(load)
    words = np.random.default_rng([load.seed, 1])
    return [
        request_body(load, model, pictures, _prompt(load, words)) for _ in range(load.num_requests)
    ]


def unique_pictures(sizes: Sequence[Size], seed: int | Sequence[int]) -> Iterator[str]:
    """Yield data URLs of PNGs without end; noise in a corner makes each unique."""
    rng = np.random.default_rng(seed)
    for size in itertools.cycle(sizes):
        image = draw(random_scene(rng, size=size))
        for column in range(min(_NOISE_PIXELS, image.width)):
            red, green, blue = rng.integers(0, 256, 3).tolist()
            image.putpixel((column, 0), (red, green, blue))
        yield data_url(image, "PNG")


def _pictures(load: Load) -> Iterator[str]:
    pictures = unique_pictures(load.image_sizes, load.seed)
    if load.image_pool == 0 or load.num_images == 0:
        return pictures
    return itertools.cycle(list(itertools.islice(pictures, load.image_pool)))


def _prompt(load: Load, rng: np.random.Generator) -> str:
    return " ".join([*rng.choice(WORDS, load.prompt_words), QUESTION])


def request_body(load: Load, model: str, pictures: Iterator[str], prompt: str) -> bytes:
    """One request about the next of the pictures, as JSON."""
    content: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": url}}
        for url in itertools.islice(pictures, load.num_images)
    ]
    content.append({"type": "text", "text": prompt})
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
    }
    if load.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.ignore_eos:
        body["ignore_eos"] = True
    return orjson.dumps(body)
