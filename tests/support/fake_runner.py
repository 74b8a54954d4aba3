"""A runner that hashes instead of computing, for tests.

Owns two make-believe pools in which each block remembers what was written to it.
Its next token is a hash of everything the position may see, read back from the
pools: a wrong block, span, chunk or order of steps changes the output, and what
no correct scheduler may do raises `SchedulingError`. Knows nothing of tensors.

`expected_token_ids` says what a request must answer, from its spans alone.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vlmserve.models.batch import (
    Accepted,
    AdapterInfo,
    AdapterRef,
    ImageTiles,
    MayStart,
    ModelInfo,
    OnLaunch,
    PoolSizes,
    PromptLogprobs,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
    never,
)
from vlmserve.router.messages import AddRequest

# below the special tokens of the bundled tokenizer
NUM_ORDINARY = 700
DEFAULT_POOLS = PoolSizes(num_text_blocks=256, num_image_blocks=32, block_size=16)


class SchedulingError(AssertionError):
    """The scheduler asked for something that no correct one does."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one position's keys and values depend on. text: all of it, as it is hashed."""

    token_id: int
    position: int
    visible: tuple[bytes, ...]
    adapter: str = ""
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once: every later token of a sequence hashes it again.
        object.__setattr__(self, "text", repr(self))


@dataclass
class FakeAdapters:
    """Adapters whose name says what they change: text, images, both or nothing.

    `broken` names fail to be read. before_read: called with each in the reading thread.
    """

    max_loras: int = 2
    num_bytes: int = 10
    before_read: Callable[[AdapterRef], None] | None = None
    known: dict[str, AdapterInfo] = field(default_factory=dict)
    read_names: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def read(self, ref: AdapterRef) -> AdapterInfo:
        """What the name says."""
        self.read_names.append(ref.name)
        if self.before_read is not None:
            self.before_read(ref)
        if "broken" in ref.name:
            raise ValueError("adapter_model.safetensors: it is broken")
        return self.known.setdefault(ref.digest, adapter_info(ref, self.num_bytes))

    def forget(self, digest: str) -> None:
        """A step that uses it from now on is an error."""
        del self.known[digest]
        self.forgotten.append(digest)


def fake_adapter(name: str) -> AdapterRef:
    """An adapter that `FakeAdapters` knows by its name, such as text1, images2 or both3."""
    return AdapterRef(name, f"/adapters/{name}", hashlib.sha256(name.encode()).hexdigest())


def adapter_info(ref: AdapterRef, num_bytes: int = 10) -> AdapterInfo:
    """What `FakeAdapters` says of it."""
    is_both = "both" in ref.name
    return AdapterInfo(4, num_bytes, is_both or "text" in ref.name, is_both or "images" in ref.name)


def fake_image(name: str, num_tiles: int = 1, tile_size: int = 2) -> ImageTiles:
    """An image whose content is its name; images of one name are the same picture."""
    digest = hashlib.sha256(name.encode()).digest()
    num_bytes = num_tiles * 3 * tile_size**2
    return ImageTiles(
        data=(digest * (num_bytes // len(digest) + 1))[:num_bytes],
        num_tiles=num_tiles,
        tile_size=tile_size,
        aspect_ratio_id=num_tiles,
        content_hash=digest,
    )


def fake_info(
    pools: PoolSizes = DEFAULT_POOLS,
    max_model_len: int = 1024,
    image_cost_tokens: int = 0,
    num_image_layers: int = 1,
) -> ModelInfo:
    """A model of 1,000 tokens that takes images of up to four 2-pixel tiles."""
    return ModelInfo(
        vocab_size=1000,
        max_model_len=max_model_len,
        max_num_tiles=4,
        tile_size=2,
        device="fake",
        dtype="hash",
        pools=pools,
        image_cost_tokens=image_cost_tokens,
        num_image_layers=num_image_layers,
    )


def expected_token_ids(
    request: AddRequest, vocab_size: int = 1000, repeats: bool = False
) -> list[int]:
    """What the fake model answers to `request` alone, ended by eos, stop id or max_tokens."""
    cells: list[_Cell] = []
    token_ids = list(request.prompt_token_ids)
    ends = {*request.eos_token_ids, *request.stop_token_ids}
    while True:
        cells += _cells_of(request, token_ids, len(cells))
        seed = _seed_of(request.sampling)
        token_ids.append(_next_token_id(cells, seed, vocab_size, repeats))
        num_generated = len(token_ids) - len(request.prompt_token_ids)
        if token_ids[-1] in ends or num_generated == request.max_tokens:
            return token_ids[len(request.prompt_token_ids) :]


def expected_prompt_logprobs(
    request: AddRequest, vocab_size: int = 1000
) -> list[PromptLogprobs | None]:
    """What the fake model says of the tokens of the prompt of `request`, the first one left out."""
    cells = _cells_of(request, request.prompt_token_ids, 0)
    return [None] + [
        _prompt_entry(cells[:place], token_id) if token_id < vocab_size else None
        for place, token_id in enumerate(request.prompt_token_ids)
        if place
    ]


def _cells_of(request: AddRequest, token_ids: list[int], begin: int) -> list[_Cell]:
    """What the positions from `begin` on depend on, from the spans alone."""
    cells = []
    of_text, of_images = "", ""
    if request.adapter is not None:
        info = adapter_info(request.adapter)
        of_text = request.adapter.digest if info.changes_text else ""
        of_images = request.adapter.digest if info.changes_images else ""
    for position in range(begin, len(token_ids)):
        visible: tuple[bytes, ...] = ()
        for image, span in zip(request.images, request.spans, strict=True):
            if span.covers(position):
                visible += _tile_contents(image, of_images)
        cells.append(_Cell(token_ids[position], position, visible, of_text))
    return cells


@dataclass
class FakeRunner:
    """A runner as the engine expects one: `info` and `execute`.

    step_seconds: how long each step takes at least. num_restarts: sequences that
    were computed from their start once more. num_rows_ahead: rows that had
    been planned ahead. repeats: most tokens repeat earlier ones; num_drafts, num_right_drafts: what
    rows had. before_step: called with each batch in the step's thread; what it
    raises is the step's failure. between_layers: what the engine lets every step call.
    """

    info: ModelInfo = field(default_factory=fake_info)
    adapters: FakeAdapters | None = None
    step_seconds: float = 0.0
    before_step: Callable[[StepBatch], None] | None = None
    between_layers: Callable[[], None] | None = None
    num_steps: int = 0
    num_layers_started: int = 0
    num_images_encoded: int = 0
    num_restarts: int = 0
    num_rows_ahead: int = 0
    repeats: bool = False
    num_drafts: int = 0
    num_right_drafts: int = 0
    max_batched_tokens: int = 0
    max_batched_sequences: int = 0
    max_batched_adapters: int = 0
    _text: dict[tuple[int, int], _Cell] = field(default_factory=dict)
    _images: dict[int, bytes] = field(default_factory=dict)
    _prepared: list[tuple[ScheduledSequence, object]] = field(default_factory=list)
    _begun: tuple[bytes, str, int] | None = None
    _copied: set[int] = field(default_factory=set)
    _num_computed: dict[str, int] = field(default_factory=dict)

    def prepare(self, rows: list[ScheduledSequence], may_start: MayStart = never) -> None:
        """Keep what the rows held when they were planned ahead."""
        self._prepared = [(one, _layout_of(one)) for one in rows]

    def call_between_layers(self, callback: Callable[[], None]) -> bool:
        """Call it once in each step, before its tokens are written."""
        self.between_layers = callback
        return True

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Write the batch into the pools and hash what its last positions see."""
        prepared, self._prepared = self._prepared, []
        on_launch()
        self._check_prepared(prepared, batch)
        self.num_layers_started += 1
        if self.before_step is not None:
            self.before_step(batch)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self._check_adapters(batch)
        self._count(batch)
        self._copy(batch)
        self._encode_layers(batch)
        for due in batch.finished_images:
            contents = _tile_contents(due.image, due.adapter)
            for block_id, content in zip(due.block_ids, contents, strict=True):
                self._images[block_id] = content
        if self.between_layers is not None:
            self.between_layers()
        for sequence in batch.sequences:
            self._write(sequence)
        sampled = [sequence for sequence in batch.sequences if sequence.sampling is not None]
        prompts = {
            one.request_id: self._prompt_logprobs(one)
            for one in batch.sequences
            if one.prompt is not None
        }
        result = StepResult({}, prompt_logprobs=prompts)
        for one in sampled:
            self._sample(one, result)
        return result

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        """This runner has no text that a grammar could be about."""
        raise ValueError("the fake model takes no grammar")

    def _check_adapters(self, batch: StepBatch) -> None:
        if not batch.adapters:
            return
        assert self.adapters is not None
        self.max_batched_adapters = max(self.max_batched_adapters, len(batch.adapters))
        if len(batch.adapters) > self.adapters.max_loras:
            raise SchedulingError(f"{len(batch.adapters)} adapters in one step")
        if missing := batch.adapters - self.adapters.known.keys():
            raise SchedulingError(f"{len(missing)} adapters of a step were not read")
        for due in batch.images:
            if due.adapter and not self.adapters.known[due.adapter].changes_images:
                raise SchedulingError("an image is encoded for an adapter that does not change it")

    def _count(self, batch: StepBatch) -> None:
        if not batch.sequences:
            raise SchedulingError("an empty step")
        self.num_steps += 1
        self.num_images_encoded += len(batch.finished_images)
        self.max_batched_tokens = max(self.max_batched_tokens, batch.num_tokens)
        self.max_batched_sequences = max(self.max_batched_sequences, len(batch.sequences))

    def _copy(self, batch: StepBatch) -> None:
        """Copy what the source blocks remember; all are read before any is written."""
        if len({copy.target for copy in batch.copies}) != len(batch.copies):
            raise SchedulingError("two copies into one block")
        read = [
            (copy.target, offset, self._text[copy.source, offset])
            for copy in batch.copies
            for offset in range(self.info.pools.block_size)
            if (copy.source, offset) in self._text
        ]
        for target, offset, cell in read:
            self._text[target, offset] = cell
        self._copied |= {copy.target for copy in batch.copies}
        self._forget(batch)

    def _forget(self, batch: StepBatch) -> None:
        """What freed blocks held is gone: reading it raises KeyError."""
        for block_id in batch.freed_text_blocks:
            for offset in range(self.info.pools.block_size):
                self._text.pop((block_id, offset), None)
        for block_id in batch.freed_image_blocks:
            self._images.pop(block_id, None)

    def _check_prepared(
        self, prepared: list[tuple[ScheduledSequence, object]], batch: StepBatch
    ) -> None:
        in_batch = {id(one) for one in batch.sequences}
        used = [(row, layout) for row, layout in prepared if id(row) in in_batch]
        if any(layout != _layout_of(row) for row, layout in used):
            raise SchedulingError("a row is not what was planned ahead")
        self.num_rows_ahead += len(used)

    def _encode_layers(self, batch: StepBatch) -> None:
        """Keep the one image of which a part is encoded, and by how many layers."""
        if len(batch.images) != len({due.block_ids[0] for due in batch.images}):
            raise SchedulingError("an image is encoded twice in one step")
        for due in batch.images:
            name = due.image.content_hash, due.adapter
            if due.begin and (*name, due.begin) != self._begun:
                raise SchedulingError(f"an image goes on at {due.begin}, kept is {self._begun}")
            end = due.end or self.info.num_image_layers
            if not due.begin < end <= self.info.num_image_layers:
                raise SchedulingError(f"layers {due.begin} to {end} of an image")
            if due.begin or due.end is not None:
                self._begun = None if due.end is None else (*name, due.end)

    def _write(self, sequence: ScheduledSequence) -> None:
        self._check_progress(sequence)
        position = sequence.start
        for segment in sequence.segments:
            visible = tuple(self._images[block_id] for block_id in segment.block_ids)
            for _ in range(segment.num_tokens):
                token_id = sequence.token_ids[position - sequence.start]
                cell = _Cell(token_id, position, visible, self._of_text(sequence))
                self._text[self._slot(sequence, position)] = cell
                position += 1
        if position != sequence.start + len(sequence.token_ids):
            raise SchedulingError("the segments do not add up to the tokens")

    def _of_text(self, sequence: ScheduledSequence) -> str:
        """The adapter, if it changes a token's keys and values."""
        if not sequence.adapter or self.adapters is None:
            return ""
        return sequence.adapter if self.adapters.known[sequence.adapter].changes_text else ""

    def _check_progress(self, sequence: ScheduledSequence) -> None:
        num_computed = self._num_computed.get(sequence.request_id, 0)
        # A start elsewhere is one behind cached or copied blocks; what they hold is hashed.
        block_index, offset = divmod(sequence.start, self.info.pools.block_size)
        is_copied = sequence.block_ids[block_index] in self._copied
        if sequence.start != num_computed and offset and not is_copied:
            raise SchedulingError(f"starts at {sequence.start}, {num_computed} are computed")
        self.num_restarts += sequence.start < num_computed
        end = sequence.start + len(sequence.token_ids)
        self._num_computed[sequence.request_id] = end
        if len(sequence.block_ids) != -(-end // self.info.pools.block_size):
            raise SchedulingError(f"{len(sequence.block_ids)} blocks for {end} tokens")

    def _sample(self, sequence: ScheduledSequence, result: StepResult) -> None:
        """Sample behind the known tokens, and behind each draft that was right."""
        assert sequence.sampling is not None
        end = sequence.start + len(sequence.token_ids)
        cells = self._cells(sequence, end)
        first = end - sequence.num_drafts
        token_ids: list[int] = []
        for place in range(first, end + 1):
            if token_ids and cells[place - 1].token_id != token_ids[-1]:
                break
            token_ids.append(self._next(cells[:place], sequence.sampling))
        num_right = len(token_ids) - 1
        result.token_ids[sequence.request_id] = token_ids[0]
        if num_right:
            result.accepted[sequence.request_id] = Accepted(token_ids[1:], [])
        self._num_computed[sequence.request_id] = first + num_right
        self.num_drafts += sequence.num_drafts
        self.num_right_drafts += num_right

    def _next(self, cells: list[_Cell], sampling: SamplingParams) -> int:
        return _next_token_id(cells, _seed_of(sampling), self.info.vocab_size, self.repeats)

    def _prompt_logprobs(self, sequence: ScheduledSequence) -> list[PromptLogprobs | None]:
        """At each target a hash of all that stands before it; None beyond the vocabulary."""
        assert sequence.prompt is not None
        entries: list[PromptLogprobs | None] = []
        for place, token_id in enumerate(sequence.prompt.token_ids, sequence.prompt.first):
            end = sequence.start + place + 1
            cells = self._cells(sequence, end)
            has_logit = token_id < self.info.vocab_size
            entries.append(_prompt_entry(cells, token_id) if has_logit else None)
        return entries

    def _cells(self, sequence: ScheduledSequence, end: int) -> list[_Cell]:
        """What the positions before `end` hold, in order. Raises KeyError for one without."""
        slots = itertools.product(sequence.block_ids, range(self.info.pools.block_size))
        return [self._text[slot] for slot in itertools.islice(slots, end)]

    def _slot(self, sequence: ScheduledSequence, position: int) -> tuple[int, int]:
        block_index, offset = divmod(position, self.info.pools.block_size)
        return sequence.block_ids[block_index], offset


def _layout_of(row: ScheduledSequence) -> object:
    """All of a row but what depends on its tokens."""
    return row.start, list(row.block_ids), list(row.segments), row.sample_index


def _seed_of(sampling: SamplingParams) -> int:
    """What an answer depends on beside its text and images; a greedy one on nothing."""
    return 0 if sampling.is_greedy else sampling.seed


def _prompt_entry(cells: list[_Cell], token_id: int) -> PromptLogprobs:
    return PromptLogprobs(token_id, -float(_next_token_id(cells, token_id, 1000)), 1, [], [])


def _tile_contents(image: ImageTiles, adapter: str = "") -> tuple[bytes, ...]:
    content = image.content_hash + adapter.encode()
    return tuple(content + bytes([tile]) for tile in range(image.num_tiles))


def _next_token_id(cells: list[_Cell], seed: int, vocab_size: int, repeats: bool = False) -> int:
    """repeats: three of four times the token three places before, which drafts find."""
    text = f"({seed}, [{', '.join([cell.text for cell in cells])}])"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    if repeats and len(cells) > 2 and number % 4:
        return cells[-3].token_id
    return number % vocab_size


class OrdinaryRunner(FakeRunner):
    """Samples no special token of the bundled tokenizer, of which some end an answer by chance."""

    def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
        result = super().execute(batch, *on_launch)
        result.token_ids = {name: one % NUM_ORDINARY for name, one in result.token_ids.items()}
        result.accepted = {
            name: Accepted([one % NUM_ORDINARY for one in more.token_ids], [])
            for name, more in result.accepted.items()
        }
        return result
