"""One answer to a request as the scheduler sees it: its tokens, and how far they are computed.

Owns the state of one accepted answer. There is no prefill or decode phase:
`num_computed_tokens` catches up with `num_tokens`. A sequence that is exactly one token behind,
and waits for no image, is decoding. Knows nothing of budgets, other requests or tensors.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from ...models.batch import (
    AdapterInfo,
    PromptLogprobs,
    PromptTargets,
    SamplingContext,
    SamplingParams,
    TokenMatcher,
)
from ...models.kv_cache.block_table import BlockTable
from ...models.sampling.token_counts import DistinctIds, TokenCounts
from ..blocks.image_pool import ImageEntry, ImageKey
from ..blocks.prefix_keys import extend_block_keys, scope_of
from ..blocks.prefix_lookup import PrefixLookup
from ..messages import AddRequest, FinishReason
from ..state_table import next_state
from .drafts.draft_source import DraftSource
from .sequence_states import TRANSITIONS, SequenceEvent, Status

# What a sequence may have to wait for before it can run.
Part = TokenMatcher | AdapterInfo


@dataclass(slots=True, frozen=True)
class Appended:
    """The tokens that an answer got, and why it ends with the last of them; None: it continues."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one answer and the blocks with their keys and values.

    sequence_id: unique in the engine; `request.request_id` is unique only on its worker.
    choice: the number of this answer in its request. The first is the leader of the others, its
    followers, until it has computed their prompt or has ended.
    token_ids: the prompt, then the generated tokens. While the sequence runs, block_ids cover all
    of them, and images[i] is the pool's entry for request.images[i].
    table: block_ids as an array, for the steps.
    num_committed_blocks: how many blocks, from the first, the prefix cache knows.
    num_cached_tokens: how many tokens were cached when the sequence first ran.
    arrival: how many requests were queued before its request.
    num_charged_tokens: how many tokens, from the first, were counted as service of its owner.
    prompt_logprobs: of the prompt's tokens computed so far; preemption keeps them. None if not
    requested, and for followers.
    lacking: the images whose tiles are on their way from its worker; see `blocks/tile_store.py`.
    matcher: its position in the request's grammar; None until the grammar is compiled.
    adapter: what the request's adapter changes; None until it is in memory. scope: see `scope_of`.
    known_vision_s: what the vision encoder had spent on its images before it ran. vision_s: what it
    spent on them until the first token.
    lookup: what the prefix cache has of it, while it waits.
    generated: the counts of its generated tokens; kept only if a penalty needs them.
    drafts: where drafts of its next tokens come from; None before the first.
    banned: the banned sequences by the token before their last one; None: they have no such token.
    queued_at, ran_at: `time.monotonic()`; ran_at is its first start and stays after preemption.
    """

    sequence_id: str
    worker_id: int
    request: AddRequest
    choice: int = 0
    sampling: SamplingParams = field(init=False)
    token_ids: list[int] = field(init=False)
    image_keys: list[ImageKey] = field(init=False)
    lacking: set[ImageKey] = field(default_factory=set)
    scope: str = field(init=False)
    end_token_ids: frozenset[int] = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)
    penalized_prompt_ids: DistinctIds = field(init=False)
    generated: TokenCounts = field(default_factory=TokenCounts)
    banned: dict[int | None, list[tuple[int, ...]]] = field(init=False)
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    images: list[ImageEntry] = field(default_factory=list)
    is_in_step: bool = False
    is_aborted: bool = False
    num_preemptions: int = 0
    num_committed_blocks: int = 0
    num_cached_tokens: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    arrival: int = 0
    num_charged_tokens: int = 0
    matcher: TokenMatcher | None = None
    lookup: PrefixLookup | None = None
    drafts: DraftSource | None = None
    adapter: AdapterInfo | None = None
    prompt_logprobs: list[PromptLogprobs | None] | None = None
    queued_at: float = field(default_factory=time.monotonic)
    ran_at: float | None = None
    known_vision_s: float = 0.0
    vision_s: float = 0.0

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        self._set_keys(changes_text=False, changes_images=False)
        self.end_token_ids = frozenset(request.eos_token_ids)
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.sampling = _sampling_of(request, self.choice)
        if request.num_prompt_logprobs is not None and self.choice == 0:
            self.prompt_logprobs = [None]  # the first token has no probability
        is_penalized = request.sampling.repetition_penalty != 1.0
        self.penalized_prompt_ids = DistinctIds(self.token_ids if is_penalized else ())
        self.banned = {}
        for one in request.sampling.banned_sequences:
            self.banned.setdefault(one[-2] if len(one) > 1 else None, []).append(one)

    def _set_keys(self, *, changes_text: bool, changes_images: bool) -> None:
        """Set what its cached blocks are known by, with what its adapter changes."""
        request, digest = self.request, self.adapter_digest
        adapter = digest if changes_images else ""
        self.image_keys = [ImageKey.of(one, request.tenant, adapter) for one in request.images]
        self.scope = scope_of(request.tenant, digest if changes_text else "")

    def take(self, part: Part) -> None:
        """Its grammar is compiled, or its adapter is in memory."""
        if not isinstance(part, AdapterInfo):
            self.matcher = part
            return
        self.adapter = part
        self._set_keys(changes_text=part.changes_text, changes_images=part.changes_images)

    @classmethod
    def of(cls, worker_id: int, request: AddRequest) -> list[Sequence]:
        """The sequences of a request, one per choice: the leader, then its followers."""
        leader, *followers = (
            cls(f"{worker_id}/{request_id}", worker_id, request, choice)
            for choice, request_id in enumerate(request.answer_ids)
        )
        for follower in followers:
            follower.status, follower.leader = Status.FOLLOWING, leader
        leader.followers = followers
        return [leader, *followers]

    @property
    def request_id(self) -> str:
        """The id of this choice on its worker."""
        return self.request.answer_ids[self.choice]

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def rank(self) -> tuple[int, int, int]:
        """The order in which an owner's sequences run: by priority number, then by arrival."""
        return self.request.priority, self.arrival, self.choice

    @property
    def level(self) -> int:
        """The priority number against other owners' sequences: 0 unless its key may cross them."""
        return self.request.priority if self.request.policy.cross_priority else 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """One token is uncomputed, and every image that it sees is encoded."""
        if self.num_uncomputed_tokens != 1:
            return False
        position = self.num_computed_tokens
        images = zip(self.images, self.request.spans, strict=True)
        return all(entry.is_encoded or not span.covers(position) for entry, span in images)

    def may_continue(self, max_model_len: int) -> bool:
        """False if the token that is now being sampled is certainly its last."""
        return self._has_room(max_model_len, num_more=1) and not self.is_aborted

    def _has_room(self, max_model_len: int, num_more: int = 0) -> bool:
        """True if it may grow after `num_more` more tokens."""
        num_generated, num_tokens = self.num_generated_tokens, self.num_tokens
        return (
            num_generated + num_more < self.request.max_tokens
            and num_tokens + num_more < max_model_len
        )

    @property
    def num_image_bytes(self) -> int:
        return sum(image.num_bytes for image in self.request.images)

    @property
    def queue_s(self) -> float:
        """How long it waited before it first ran; 0 before that."""
        return 0.0 if self.ran_at is None else self.ran_at - self.queued_at

    @property
    def images_vision_s(self) -> float:
        """Seconds that the vision encoder has spent on its images, each counted once."""
        return sum({id(entry): entry.vision_s for entry in self.images}.values())

    @property
    def lacks_matcher(self) -> bool:
        """True while its grammar is being compiled."""
        return self.request.grammar is not None and self.matcher is None

    @property
    def lacks_adapter(self) -> bool:
        """True while its adapter is being read."""
        return self.request.adapter is not None and self.adapter is None

    @property
    def may_run(self) -> bool:
        """False while it lacks its matcher, its adapter or tiles of its images."""
        return not self.lacking and not self.lacks_matcher and not self.lacks_adapter

    @property
    def adapter_digest(self) -> str:
        """The digest of its adapter; empty for the base model."""
        return "" if self.request.adapter is None else self.request.adapter.digest

    @property
    def adapter_name(self) -> str:
        """The name that its worker gives its adapter; empty for the base model."""
        return "" if self.request.adapter is None else self.request.adapter.name

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def move(self, event: SequenceEvent) -> None:
        """Change `status` as the table allows. Raises IllegalTransitionError."""
        self.status = next_state(TRANSITIONS, self.status, event)

    def append(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Add a generated token; returns why the answer ends with it, or None if it continues."""
        self.token_ids.append(token_id)
        if self.sampling.has_penalties:
            self.generated.add(token_id)
        if self.num_generated_tokens == 1 and self.leader is None:
            self.vision_s = self.images_vision_s - self.known_vision_s
        if self.matcher is not None:
            self.matcher.accept(token_id)
            if self.matcher.has_failed:
                return "abort"
        if token_id in self.end_token_ids or token_id in self.stop_token_ids:
            return "stop"
        return None if self._has_room(max_model_len) else "length"

    def extend(self, token_ids: list[int], max_model_len: int) -> Appended:
        """Add generated tokens up to the one that ends the answer; the others are dropped."""
        if self.drafts is not None:
            self.drafts.record(token_ids)
        for count, token_id in enumerate(token_ids, 1):
            if (reason := self.append(token_id, max_model_len)) is not None:
                return Appended(token_ids[:count], reason)
        return Appended(token_ids)

    def num_drafts_allowed(self, max_model_len: int) -> int:
        """How many drafts may count: the token sampled behind them must have room too."""
        num_left = self.request.max_tokens - self.num_generated_tokens
        return min(num_left, max_model_len - self.num_tokens) - 1

    def full_block_keys(self, block_size: int) -> list[bytes]:
        """The prefix cache's keys of all full blocks; each is computed once."""
        if len(self.block_keys) < self.num_tokens // block_size:
            request = self.request
            extend_block_keys(
                self.block_keys,
                self.token_ids,
                request.spans,
                self.image_keys,
                self.scope,
                block_size,
            )
        return self.block_keys

    def sampling_context(self, drafts: list[int] | None = None) -> SamplingContext | None:
        """What the next token depends on besides the logits; None if nothing.

        drafts: tokens in front of it that are not in the sequence yet.
        """
        params, more = self.sampling, drafts or []
        is_short = self.num_generated_tokens + len(more) < params.min_tokens
        if not is_short and not params.has_penalties and not params.banned_sequences:
            return None
        banned = [*self.end_token_ids, *self.stop_token_ids] if is_short else []
        banned += self._ends_of_banned_sequences(more)
        generated = self.generated.after(more) if more else self.generated
        return SamplingContext(
            prompt_token_ids=self.penalized_prompt_ids,
            generated_token_ids=generated.token_ids if params.has_penalties else (),
            banned_token_ids=banned,
            generated_counts=generated.counts if params.has_penalties else (),
        )

    def _ends_of_banned_sequences(self, drafts: list[int]) -> Iterator[int]:
        """The tokens that would complete a banned sequence, whose start was generated."""
        last_id = drafts[-1] if drafts else self.token_ids[-1]
        for one in (*self.banned.get(None, ()), *self.banned.get(last_id, ())):
            *start, last = one
            num_known = max(0, len(start) - len(drafts))
            known = self.token_ids[self.num_tokens - num_known :]
            is_generated = num_known <= self.num_generated_tokens
            if is_generated and known + drafts[len(drafts) - len(start) + num_known :] == start:
                yield last

    @property
    def num_reusable_tokens(self) -> int:
        """How many tokens, from the first, may come from the prefix cache.

        The last token is always computed, to sample from its logits. So are tokens whose logits
        give the next prompt token's log-probability, if that is requested and not known yet.
        """
        most = self.num_tokens - 1
        known = self.prompt_logprobs
        if known is None or len(known) == len(self.request.prompt_token_ids):
            return most
        return min(most, len(known) - 1)

    def prompt_targets(self, start: int, end: int) -> PromptTargets | None:
        """Which log-probabilities are due when positions start .. end - 1 are computed."""
        if self.prompt_logprobs is None:
            return None
        prompt_token_ids = self.request.prompt_token_ids
        begin = max(start + 1, len(self.prompt_logprobs))
        token_ids = prompt_token_ids[begin : end + 1]
        if not token_ids:
            return None
        return PromptTargets(begin - 1 - start, token_ids, self.request.num_prompt_logprobs or 0)

    def matched_stop_token_id(self) -> int | None:
        """The last token if it is one of the request's stop tokens and does not end the turn."""
        last = self.token_ids[-1]
        return last if last in self.stop_token_ids and last not in self.end_token_ids else None


def _sampling_of(request: AddRequest, choice: int) -> SamplingParams:
    """The request's parameters, with a different seed for each choice.

    The first choice keeps the request's seed, so it does not depend on how many were requested.
    """
    if choice == 0:
        return request.sampling
    digest = hashlib.sha256(f"{request.sampling.seed}/{choice}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    return msgspec.structs.replace(request.sampling, seed=seed)
