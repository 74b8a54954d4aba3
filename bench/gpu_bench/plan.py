"""Which rows are measured, in which order, and how large.

Owns the two sizes of a run and the rows' order: the most important rows come first, because the
budget drops the last ones. Knows nothing of how a row is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAIN, INT8 = "none", "int8"
EAGER, GRAPHS = "eager", "graphs"
DECODE, PREFILL, ENCODE = "decode", "prefill", "encode"
PRODUCTS, PROFILE = "products", "profile"
# one row of `long_tokens`; a prompt's chunk beside the rows; sampling with top-p
LONG, CHUNK, TOP_P = LOADS = ("long", "chunk", "top-p")
ONE_TILE = "one tile"
# of the batches, the one of which a row is long
LONG_PLACE = -2


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a run. model: a layout of checkpoints.py.

    context: tokens of a prompt before its decode; steps: timed decode steps, after warm_steps;
    repeats: of a prefill and of an image. copy_bytes: of the copy that measures bandwidth.
    max_model_len: the runner's; graphs are recorded for that length. long_tokens: of the one long
    row; chunk: tokens of a prompt beside decodes. sweeps: int8 products in other tilings too.
    """

    model: str
    device: str
    dtype: str
    batches: tuple[int, ...]
    context: int
    warm_steps: int
    steps: int
    prefill_tokens: int
    repeats: int
    copy_bytes: int
    max_model_len: int
    long_tokens: int
    chunk: int
    sweeps: bool = False

    def length(self, batch: int) -> int:
        """The most tokens of a sequence: it also decodes while later sequences wait to start."""
        return self.context + self.warm_steps + self.steps + 2 * batch + 8


FULL = Size(
    "11b", "cuda", "bfloat16", (1, 8, 32, 64), 256, 12, 100, 2048, 10, 2 << 30, 40_960, 32_768, 192
)
TINY = Size("tiny", "cpu", "float32", (1, 2), 12, 2, 4, 32, 2, 1 << 22, 64, 30, 4)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    batch: sequences of a step; has_image: each sees an image. load: what makes it unlike others of
    its kind: one of LOADS, or ONE_TILE of an image that is encoded.
    """

    kind: str
    quantize: str
    mode: str
    batch: int = 1
    has_image: bool = False
    load: str = ""

    @property
    def id(self) -> str:
        """Its name, such as "decode/int8/graphs/image/8" or "decode/none/graphs/text/32/long"."""
        content = "image" if self.has_image else "text"
        name = f"{self.kind}/{self.quantize}/{self.mode}/{content}/{self.batch}"
        return f"{name}/{self.load}" if self.load else name

    @property
    def estimated(self) -> str:
        """The step of `step_model.py` that estimates it, if any does."""
        if self.kind == ENCODE:
            return ENCODE
        is_plain_text = self.kind == DECODE and not self.has_image
        return "/".join(filter(None, (self.kind, str(self.batch), self.load))) * is_plain_text


def rows_of(quantize: str, batches: Sequence[int]) -> list[Row]:
    """The rows of one kind of weights, the most important first, a mode's rows together.

    Graphs first: the server uses them. Vision and prefill run without them.
    """
    rows = _decodes(quantize, GRAPHS, batches)
    eager = _decodes(quantize, EAGER, batches)
    first = [Row(PRODUCTS, quantize, EAGER), Row(PREFILL, quantize, EAGER)]
    if quantize == PLAIN:  # the vision encoder is not quantized
        first += [Row(ENCODE, quantize, EAGER, has_image=True, load=one) for one in ("", ONE_TILE)]
    loaded = [Row(DECODE, quantize, GRAPHS, batches[-1], load=load) for load in (CHUNK, TOP_P)]
    loaded.append(Row(DECODE, quantize, GRAPHS, batches[max(LONG_PLACE, -len(batches))], load=LONG))
    # last: the profiler's hooks stay in the process and slow later rows
    profiles = [Row(PROFILE, quantize, EAGER, batch) for batch in _outer(batches)]
    return [*rows[:2], *loaded, *rows[2:], *eager[:2], *first, *eager[2:], *profiles]


def _decodes(quantize: str, mode: str, batches: Sequence[int]) -> list[Row]:
    """The outermost batches first, text before images."""
    outer = _outer(batches)
    inner = [batch for batch in batches if batch not in outer]
    return [
        Row(DECODE, quantize, mode, batch, has_image)
        for some in (outer, inner)
        for has_image in (False, True)
        for batch in some
    ]


def _outer(batches: Sequence[int]) -> list[int]:
    return list(dict.fromkeys((batches[0], batches[-1])))


# seconds that a row takes at first guess on a GPU, compiling included
_FIRST_GUESS_S = {DECODE: 12.0, PREFILL: 10.0, ENCODE: 10.0, PRODUCTS: 10.0, PROFILE: 8.0}


def expected_s(row: Row, taken_s: dict[str, float]) -> float:
    """What a row will take: the longest of its kind so far, or a guess."""
    return taken_s.get(row.kind, _FIRST_GUESS_S[row.kind])
