"""Training batches: pictures as tiles, labels of their patches, and conversations about them.

Owns the mixture of scenes, question types and conversation forms, and the layout of a batch. Most
pictures are drawn at the size that the image processor would resize them to; some are encoded as a
file and resized.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.models.mllama.image_processing_pil_mllama import (
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from ..pictures import (
    BACKGROUNDS,
    KINDS,
    Scene,
    draw,
    encode,
    random_scene,
    random_size,
    silhouette,
)
from .config import IMAGE_MEAN, IMAGE_STD, MAX_TILES, PATCH_SIZE, TILE_SIZE
from .questions import Question, ask
from .small_talk import NO_PICTURE, SYSTEM, talk
from .tokenizer import SPECIAL_IDS, Encoder, Message

IGNORE = -100
_GRID = TILE_SIZE // PATCH_SIZE  # patches along a tile's side
_PATCHES = _GRID * _GRID
_WEIGHTS = {
    "describe": 0.15, "colour": 0.12, "shape": 0.12, "background": 0.06, "count": 0.14,
    "count_kind": 0.08, "list": 0.07, "is_there": 0.09, "is_it": 0.08, "absent": 0.08, "read": 0.01,
}  # fmt: skip


@dataclass(slots=True)
class Pictures:
    """A batch of pictures and what is in them.

    pixel_values: [pictures, 1, 4, 3, 56, 56]; aspect_ratio_ids: [pictures, 1]; aspect_ratio_mask:
    [pictures, 1, 4]. Labels are int64, IGNORE if there is nothing to learn. Of patches,
    [pictures, 4, 16]: kind (0 none), colour, is_centre. Of pictures: background, count
    [pictures], kind_counts [pictures, kinds]. outline: [pictures, 4, 16, 49], how much of each
    2 x 2 pixel cell of a patch is covered by shapes, 0 to 1. place: [pictures, 4, 16, 3], from a
    patch to the centre of the shape it belongs to, x and y, and that shape's radius, in patches;
    NaN where kind is not above 0.
    """

    pixel_values: Tensor
    aspect_ratio_ids: Tensor
    aspect_ratio_mask: Tensor
    kind: Tensor
    colour: Tensor
    is_centre: Tensor
    background: Tensor
    count: Tensor
    kind_counts: Tensor
    outline: Tensor
    place: Tensor


@dataclass(slots=True)
class Rows:
    """Conversations of about the same length, padded on the right.

    input_ids, targets (IGNORE where nothing is learned): [rows, tokens]. pictures: [rows, k], the
    indices of a row's pictures in its batch; sees: bool [rows, tokens, k], which of them a token
    sees: the latest before it, itself included.
    """

    input_ids: Tensor
    targets: Tensor
    sees: Tensor
    pictures: Tensor


@dataclass(slots=True)
class Batch:
    """Pictures, and the conversations about them in buckets by length."""

    pictures: Pictures
    buckets: list[Rows]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a data set is made of. max_shapes: in a scene; rows_per_picture: 0 for none."""

    batch_size: int = 32
    rows_per_picture: int = 3
    max_shapes: int = 4
    num_buckets: int = 3


class Conversations(IterableDataset[Batch]):
    """Endless random batches; batch i depends on (seed, i) alone."""

    def __init__(self, encoder: Encoder, mixture: Mixture, seed: int, first: int = 0) -> None:
        self._encoder = encoder
        self._mixture = mixture
        self._seed = seed
        self._first = first

    def __iter__(self) -> Iterator[Batch]:
        index = self._first
        while True:
            yield self.batch(np.random.default_rng((self._seed, index)))
            index += 1

    def batch(self, rng: np.random.Generator) -> Batch:
        """One random batch."""
        mixture = self._mixture
        scenes = [training_scene(rng, mixture.max_shapes) for _ in range(mixture.batch_size)]
        rows = [
            self._row(rng, scenes, index)
            for index in range(len(scenes))
            for _ in range(mixture.rows_per_picture)
        ]
        rows.sort(key=lambda row: len(row.input_ids))
        return Batch(stack_pictures(scenes, rng), [pad_rows(b) for b in self._buckets(rows)])

    def _buckets(self, rows: list[Row]) -> list[list[Row]]:
        """Sorted rows in buckets; the few longest rows have their own."""
        num_long = len(rows) // 16
        most, long = rows[: len(rows) - num_long], rows[len(rows) - num_long :]
        size = max(1, -(-len(most) // self._mixture.num_buckets))
        buckets = [most[i : i + size] for i in range(0, len(most), size)]
        return [*buckets, long] if long else buckets

    def _row(self, rng: np.random.Generator, scenes: list[Scene], index: int) -> Row:
        """A conversation about the picture at this index; a few have a second picture."""
        messages, pictures = conversation(rng, scenes[index]), [index]
        if rng.random() < 0.03:
            other = int(rng.integers(len(scenes)))
            messages += conversation(rng, scenes[other], is_first=False)
            pictures.append(other)
        return encode_row(self._encoder, messages, pictures)


def training_scene(rng: np.random.Generator, max_shapes: int) -> Scene:
    """A random scene in a random size; nearly half are square."""
    side = int(rng.integers(112, 400))
    size = (side, side) if rng.random() < 0.4 else random_size(rng)
    num_shapes = None
    if max_shapes < 4:
        num_shapes = int(rng.integers(0 if rng.random() < 0.2 else 1, max_shapes + 1))
    return random_scene(rng, num_shapes, size)


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """A picture's layout on tiles. height, width: pixels in the canvas; rows, columns: of tiles."""

    height: int
    width: int
    rows: int
    columns: int

    @property
    def aspect_ratio_id(self) -> int:
        """The image processor's number of the tile arrangement, from 1."""
        return get_all_supported_aspect_ratios(MAX_TILES).index((self.rows, self.columns)) + 1


def layout_of(width: int, height: int) -> Layout:
    """The layout that the image processor chooses for a picture of this size in pixels."""
    canvas_height, canvas_width = get_optimal_tiled_canvas(height, width, MAX_TILES, TILE_SIZE)
    new_height, new_width = get_image_size_fit_to_canvas(
        height, width, canvas_height, canvas_width, TILE_SIZE
    )
    rows, columns = int(canvas_height) // TILE_SIZE, int(canvas_width) // TILE_SIZE
    return Layout(int(new_height), int(new_width), rows, columns)


def stack_pictures(scenes: list[Scene], rng: np.random.Generator) -> Pictures:
    """The scenes drawn, cut into tiles and labelled."""
    layouts = [layout_of(scene.width, scene.height) for scene in scenes]
    pixels = np.stack([_tiles(s, layout, rng) for s, layout in zip(scenes, layouts, strict=True)])
    patches = np.stack([_label_patches(s, lay) for s, lay in zip(scenes, layouts, strict=True)])
    labels = torch.from_numpy(patches[:, :3]).long()
    num_tiles = torch.tensor([layout.rows * layout.columns for layout in layouts])
    return Pictures(
        pixel_values=torch.from_numpy(pixels)[:, None],
        aspect_ratio_ids=torch.tensor([[layout.aspect_ratio_id] for layout in layouts]),
        aspect_ratio_mask=(torch.arange(MAX_TILES) < num_tiles[:, None]).long()[:, None],
        kind=labels[:, 0],
        colour=labels[:, 1],
        is_centre=labels[:, 2],
        background=torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
        count=torch.tensor([len(scene.shapes) for scene in scenes]),
        kind_counts=torch.tensor([[len(s.of_kind(kind)) for kind in KINDS] for s in scenes]),
        place=torch.from_numpy(patches[:, 3:].transpose(0, 2, 3, 1)),
        outline=torch.from_numpy(
            np.stack([_outline(s, layout) for s, layout in zip(scenes, layouts, strict=True)])
        ),
    )


def _tiles(scene: Scene, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """The picture as the image processor cuts it: [4, 3, 56, 56] float32, unused tiles zero."""
    size = (layout.width, layout.height)
    is_file = rng.random() < 0.15
    image = _through_a_file(draw(scene), size, rng) if is_file else draw(scene, size)
    shape = (layout.rows * TILE_SIZE, layout.columns * TILE_SIZE, 3)
    canvas: np.ndarray = np.zeros(shape, np.float32)
    canvas[: layout.height, : layout.width] = np.asarray(image, np.float32) / 255
    canvas = (canvas - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    tiles = np.zeros((MAX_TILES, 3, TILE_SIZE, TILE_SIZE), np.float32)
    cut = canvas.reshape(layout.rows, TILE_SIZE, layout.columns, TILE_SIZE, 3)
    used = layout.rows * layout.columns
    tiles[:used] = cut.transpose(0, 2, 4, 1, 3).reshape(used, 3, TILE_SIZE, TILE_SIZE)
    return tiles


def _through_a_file(
    image: Image.Image, size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """The picture resized like by the image processor, in most cases after JPEG encoding."""
    if rng.random() < 0.6:
        body = encode(image, "JPEG", quality=int(rng.integers(60, 96)))
        image = Image.open(io.BytesIO(body)).convert("RGB")
    return image.resize(size, Image.Resampling.BILINEAR)


def _label_patches(scene: Scene, layout: Layout) -> np.ndarray:
    """Kind, colour, is-centre, place of each patch: [6, 4, 16] float32, IGNORE on unused tiles."""
    shape = (layout.rows * _GRID, layout.columns * _GRID)
    y, x = ((np.indices(shape) + 0.5) * PATCH_SIZE).astype(np.float32)
    grid = np.full((6, *shape), np.nan, np.float32)
    grid[[0, 2]] = 0
    grid[1] = BACKGROUNDS.index(scene.background)
    for thing in scene.shapes:
        centre_x, centre_y = thing.x * layout.width, thing.y * layout.height
        radius = thing.radius * min(layout.width, layout.height)
        is_inside = np.hypot(x - centre_x, y - centre_y) < radius * 0.9 + 2
        grid[0, is_inside] = KINDS.index(thing.kind) + 1
        grid[1, is_inside] = BACKGROUNDS.index(thing.colour)
        grid[2, int(centre_y) // PATCH_SIZE, int(centre_x) // PATCH_SIZE] = 1
        place = np.stack([centre_x - x, centre_y - y, np.full_like(x, radius)]) / PATCH_SIZE
        grid[3:, is_inside] = place[:, is_inside]
    grid[1, (y > layout.height) | (x > layout.width)] = IGNORE
    labels = np.full((6, MAX_TILES, _PATCHES), IGNORE, np.float32)
    labels[3:] = np.nan
    grid = grid.reshape(6, layout.rows, _GRID, layout.columns, _GRID)
    used = layout.rows * layout.columns
    labels[:, :used] = grid.transpose(0, 1, 3, 2, 4).reshape(6, used, _PATCHES)
    return labels


def _outline(scene: Scene, layout: Layout) -> np.ndarray:
    """Coverage by shapes of each cell of each patch: [4, 16, 49] float32, zero on unused tiles."""
    image = draw(silhouette(scene), (layout.width, layout.height), supersample=1)
    canvas = np.zeros((layout.rows * TILE_SIZE, layout.columns * TILE_SIZE), np.float32)
    canvas[: layout.height, : layout.width] = np.asarray(image, np.float32)[..., 0] / 255
    cells = PATCH_SIZE // 2
    cut = canvas.reshape(layout.rows, _GRID, cells, 2, layout.columns, _GRID, cells, 2)
    cut = cut.mean((3, 7)).transpose(0, 3, 1, 4, 2, 5)  # tile row, tile column, patch, cell
    outline = np.zeros((MAX_TILES, _PATCHES, cells * cells), np.float32)
    used = layout.rows * layout.columns
    outline[:used] = cut.reshape(used, _PATCHES, cells * cells)
    return outline


# --- conversations ------------------------------------------------------------------------------


def conversation(rng: np.random.Generator, scene: Scene, is_first: bool = True) -> list[Message]:
    """A random conversation about the scene; a few have no picture, unless it is a later one."""
    if not is_first:
        return _about_picture(rng, scene, 1)
    messages = [Message("system", str(rng.choice(SYSTEM)))] if rng.random() < 0.18 else []
    form = rng.random()
    if form < 0.80:
        return messages + _about_picture(rng, scene, 1)
    if form < 0.87:
        return messages + _about_picture(rng, scene, int(rng.integers(2, 4)))
    if form < 0.91:
        return messages + _about_picture(rng, scene, int(rng.integers(4, 10)))
    if form < 0.98:
        return messages + _without_picture(rng, scene, 1 if rng.random() < 0.7 else 3)
    return messages + _without_picture(rng, scene, 1) + _about_picture(rng, scene, 1)


def random_question(rng: np.random.Generator, scene: Scene) -> Question:
    """A question that the scene allows, its type drawn by weight."""
    while True:
        question_type = str(rng.choice(list(_WEIGHTS), p=list(_WEIGHTS.values())))
        question = ask(scene, question_type, rng)
        if question is not None:
            return question


def _about_picture(rng: np.random.Generator, scene: Scene, num_turns: int) -> list[Message]:
    """Turns about the picture, which is in the first message; some are small talk."""
    messages: list[Message] = []
    is_first = bool(rng.random() < 0.65)
    for turn in range(num_turns):
        if rng.random() < (0.04 if turn == 0 else 0.12):
            text, answer = talk(rng)
        else:
            question = random_question(rng, scene)
            text, answer = question.text, question.answer
        messages.append(Message("user", text, int(turn == 0), is_first))
        messages.append(Message("assistant", answer))
    return messages


def _without_picture(rng: np.random.Generator, scene: Scene, num_turns: int) -> list[Message]:
    """Small talk, and questions about a missing picture."""
    messages: list[Message] = []
    for _ in range(num_turns):
        if rng.random() < 0.6:
            text, answer = talk(rng)
        else:
            question = random_question(rng, scene)
            is_reading = question.type == "read"
            text, answer = question.text, question.answer if is_reading else NO_PICTURE
        messages += [Message("user", text), Message("assistant", answer)]
    return messages


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation: ids, targets (the next id, or IGNORE), the indices of its pictures, and the
    position of each picture that a token sees: 0 for the first, -1 for none."""

    input_ids: list[int]
    targets: list[int]
    pictures: list[int]
    sees: list[int]


def encode_row(encoder: Encoder, messages: list[Message], pictures: list[int]) -> Row:
    """The conversation as ids, with the id that each predicts, and its pictures."""
    encoded = encoder.encode(messages)
    ids, is_learned = encoded.ids, encoded.is_learned
    learned = zip(ids[1:], is_learned[1:], strict=True)
    targets = [token_id if flag else IGNORE for token_id, flag in learned]
    image_id = SPECIAL_IDS["<|image|>"]
    sees = np.cumsum([token_id == image_id for token_id in ids[:-1]]) - 1
    # a conversation with fewer images than pictures has the last of them
    return Row(ids[:-1], targets, pictures[-max(1, int(sees[-1]) + 1) :], sees.tolist())


def pad_rows(rows: list[Row]) -> Rows:
    """Rows as tensors."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    num_pictures = max(len(row.pictures) for row in rows)
    input_ids = torch.full(shape, SPECIAL_IDS["<|finetune_right_pad_id|>"])
    targets, sees = torch.full(shape, IGNORE), torch.full(shape, -1)
    pictures = torch.zeros((len(rows), num_pictures), dtype=torch.int64)
    for i, row in enumerate(rows):
        end = len(row.input_ids)
        input_ids[i, :end] = torch.tensor(row.input_ids)
        targets[i, :end] = torch.tensor(row.targets)
        sees[i, :end] = torch.tensor(row.sees)
        pictures[i, : len(row.pictures)] = torch.tensor(row.pictures)
    return Rows(input_ids, targets, sees[..., None] == torch.arange(num_pictures), pictures)
