"""Synthetic pictures: up to four plain shapes on a plain background.

Owns random scenes and their pixels; dataset/questions.py has the questions about them. Everything
is deterministic given the generator:

    rng = numpy.random.default_rng(7)
    scene = random_scene(rng, num_shapes=2, size=(300, 200))
    picture = draw(scene)                # PIL image, RGB, 300 x 200
    body = encode(picture, "JPEG")       # bytes; data_url(picture) for a request
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

KINDS = ("circle", "square", "star", "triangle")
MAX_SHAPES = 4

# several anchors for each colour: the named web colours and softer ones
ANCHORS: dict[str, tuple[RGB, ...]] = {
    "black": ((0, 0, 0), (20, 20, 20)),
    "blue": ((0, 0, 255), (30, 80, 220), (20, 40, 190)),
    "gray": ((128, 128, 128), (145, 145, 145)),
    "green": ((0, 128, 0), (0, 200, 0), (0, 255, 0), (40, 160, 70)),
    "orange": ((255, 165, 0), (255, 145, 0), (245, 130, 20)),
    "purple": ((128, 0, 128), (150, 50, 200), (160, 32, 240)),
    "red": ((255, 0, 0), (220, 30, 30), (200, 10, 20)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "yellow": ((255, 255, 0), (255, 235, 30), (250, 225, 20)),
}
BACKGROUNDS = tuple(ANCHORS)
COLOURS = tuple(name for name in ANCHORS if name != "gray")

_JITTER = 8  # of each channel, out of 255
# radius as a share of the shorter side, by the number of shapes
_RADII = {1: (0.19, 0.38), 2: (0.17, 0.28), 3: (0.15, 0.21), 4: (0.14, 0.18)}
_GAP = 0.05  # between two shapes and to the edge, as a share of the shorter side
_SUPERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. x, y: centre as shares of width and height; radius: of the circle around it, as a
    share of the shorter side; tilt: degrees clockwise."""

    kind: str
    colour: str
    rgb: RGB
    x: float
    y: float
    radius: float
    tilt: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. width, height: pixels; shapes never overlap."""

    width: int
    height: int
    background: str
    background_rgb: RGB
    shapes: tuple[Shape, ...]

    def of_kind(self, kind: str) -> list[Shape]:
        """The shapes of this kind."""
        return [shape for shape in self.shapes if shape.kind == kind]

    def of_colour(self, colour: str) -> list[Shape]:
        """The shapes of this colour."""
        return [shape for shape in self.shapes if shape.colour == colour]


def random_scene(
    rng: np.random.Generator,
    num_shapes: int | None = None,
    size: tuple[int, int] = (224, 224),
    is_distinct: bool = False,
) -> Scene:
    """A random scene of `num_shapes` shapes, 0 to 4; None chooses, most often 1 or 2.

    size: width and height in pixels. is_distinct: no two shapes share a kind or a colour, so every
    question about them has one answer. Raises ValueError for another number of shapes.
    """
    if num_shapes is None:
        num_shapes = int(rng.choice(5, p=(0.06, 0.32, 0.34, 0.16, 0.12)))
    if not 0 <= num_shapes <= MAX_SHAPES:
        raise ValueError(f"num_shapes is {num_shapes}: it must be 0 to {MAX_SHAPES}")
    background = str(rng.choice(BACKGROUNDS))
    looks = _random_looks(rng, num_shapes, background, is_distinct)
    places = _random_places(rng, num_shapes, size)
    shapes = tuple(
        Shape(kind, colour, _random_rgb(rng, colour), x, y, radius, _random_tilt(rng))
        for (kind, colour), (x, y, radius) in zip(looks, places, strict=True)
    )
    return Scene(*size, background, _random_rgb(rng, background), shapes)


def random_size(rng: np.random.Generator, low: int = 100, high: int = 600) -> tuple[int, int]:
    """A random width and height: `low` to `high` pixels a side, at most 2 to 1; a third square."""
    side = int(rng.integers(low, high + 1))
    if rng.random() < 0.34:
        return side, side
    ratio = float(np.exp(rng.uniform(-math.log(2), math.log(2))))
    other = int(np.clip(round(side * ratio), max(low, side / 2), min(high, side * 2)))
    return side, other


def draw(
    scene: Scene, size: tuple[int, int] | None = None, supersample: int | None = None
) -> Image.Image:
    """The scene as an RGB picture, antialiased; `size` (width, height) overrides the scene's."""
    width, height = size or (scene.width, scene.height)
    # a large picture needs less supersampling for the same edge, and costs more
    factor = supersample or (_SUPERSAMPLE if width * height <= 256 * 256 else 2)
    image = Image.new("RGB", (width * factor, height * factor), scene.background_rgb)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y = shape.x * width * factor, shape.y * height * factor
        radius = shape.radius * min(width, height) * factor
        if shape.kind == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
        else:
            canvas.polygon(_corners(shape.kind, x, y, radius, shape.tilt), fill=shape.rgb)
    return image.reduce(factor)


def silhouette(scene: Scene) -> Scene:
    """The same shapes, all white on black."""
    shapes = tuple(replace(shape, rgb=(255, 255, 255)) for shape in scene.shapes)
    return replace(scene, background_rgb=(0, 0, 0), shapes=shapes)


def encode(image: Image.Image, image_format: str = "PNG", quality: int = 90) -> bytes:
    """The picture as a PNG or JPEG file."""
    buffer = io.BytesIO()
    options = {"quality": quality} if image_format == "JPEG" else {}
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def data_url(image: Image.Image, image_format: str = "PNG") -> str:
    """The picture as a data URL for a chat request."""
    body = base64.b64encode(encode(image, image_format)).decode("ascii")
    return f"data:image/{image_format.lower()};base64,{body}"


def _random_looks(
    rng: np.random.Generator, num_shapes: int, background: str, is_distinct: bool
) -> list[tuple[str, str]]:
    """Kind and colour of each shape; the background's colour is never a shape's."""
    colours = [colour for colour in COLOURS if colour != background]
    # some pictures repeat a kind or a colour on purpose, to practise counting by kind
    share_kinds = not is_distinct and rng.random() < 0.35
    share_colours = not is_distinct and rng.random() < 0.25
    kinds = rng.choice(KINDS, num_shapes, replace=share_kinds)
    if share_kinds and rng.random() < 0.4:
        kinds[:] = rng.choice(KINDS)
    picked = rng.choice(colours, num_shapes, replace=share_colours)
    if share_colours and rng.random() < 0.4:
        picked[:] = rng.choice(colours)
    return [(str(kind), str(colour)) for kind, colour in zip(kinds, picked, strict=True)]


def _random_places(
    rng: np.random.Generator, num_shapes: int, size: tuple[int, int]
) -> list[tuple[float, float, float]]:
    """Centres and radii of shapes that keep their distance, in the units of Shape."""
    width, height = size[0] / min(size), size[1] / min(size)
    shrink = 1.0
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(num_shapes * 30):
            if len(placed) == num_shapes:
                break
            radius = rng.uniform(*_RADII[num_shapes]) * shrink
            margin = radius + _GAP
            x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
            if all(math.hypot(x - u, y - v) > radius + r + _GAP for u, v, r in placed):
                placed.append((x, y, radius))
        if len(placed) == num_shapes:
            return [(x / width, y / height, radius) for x, y, radius in placed]
        shrink *= 0.97  # start again, a little smaller, with the same number of shapes


def _random_rgb(rng: np.random.Generator, colour: str) -> RGB:
    """A hue of the colour: one of its anchors, jittered."""
    anchors = ANCHORS[colour]
    anchor = np.array(anchors[int(rng.integers(len(anchors)))])
    red, green, blue = np.clip(anchor + rng.integers(-_JITTER, _JITTER + 1, 3), 0, 255).tolist()
    return red, green, blue


def _random_tilt(rng: np.random.Generator) -> float:
    """Upright half of the time, else a few degrees."""
    return 0.0 if rng.random() < 0.5 else float(rng.uniform(-10, 10))


def _corners(
    kind: str, x: float, y: float, radius: float, tilt: float
) -> list[tuple[float, float]]:
    """The polygon's corners, clockwise from the top, on the circle around (x, y)."""
    if kind == "star":
        # 0.382: the inner corners of a regular pentagram; fatter ones are mistaken for triangles
        rays = [(90 - 36 * i, 1.0 if i % 2 == 0 else 0.382) for i in range(10)]
    elif kind == "square":
        rays = [(45 - 90 * i, 1.0) for i in range(4)]
    else:
        rays = [(90 - 120 * i, 1.0) for i in range(3)]
    angles = [(math.radians(degrees - tilt), reach * radius) for degrees, reach in rays]
    return [(x + reach * math.cos(a), y - reach * math.sin(a)) for a, reach in angles]
