"""What an engine reports: to workers its outputs and counts, to tests its state.

Owns how they are made of the scheduler's. Changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..messages import EngineStats, SequenceOutput
from ..scheduler.interface import Progress, SchedulerCounts, SchedulerSnapshot
from ..scheduler.sequence import Sequence
from ..scheduler.sequence_states import Status


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's state at one moment.

    open: the (worker id, request id) of every choice without a final message. num_aborting: how
    many of them end with the step that is being computed. num_compiling: how many wait for their
    grammar.
    """

    open: frozenset[tuple[int, str]]
    num_aborting: int
    num_compiling: int
    num_steps: int
    scheduler: SchedulerSnapshot


def output_of(progress: Progress) -> SequenceOutput:
    """What a step changed for one answer, as its worker gets it."""
    sequence = progress.sequence
    is_first = 0 < len(progress.token_ids) == sequence.num_generated_tokens
    return SequenceOutput(
        request_id=sequence.request_id,
        token_ids=progress.token_ids,
        num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
        queue_s=sequence.queue_s if is_first else 0.0,
        vision_s=sequence.vision_s if is_first else 0.0,
        finish_reason=progress.finish_reason,
        stop_token_id=progress.stop_token_id,
        logprobs=progress.logprobs,
        prompt_logprobs=sequence.prompt_logprobs if is_first else None,
    )


def stats_of(counts: SchedulerCounts, num_open: int) -> EngineStats:
    """The scheduler's counts; the engine adds its own. num_open: answers without an end."""
    text, images = counts.text, counts.images
    return EngineStats(
        num_running=counts.num_running,
        num_waiting=num_open - counts.num_running,
        text_blocks_used=text.used,
        text_blocks_total=text.total,
        text_blocks_cached=text.cached,
        image_blocks_used=images.used,
        image_blocks_cached=images.cached,
        image_blocks_total=images.total,
        num_preemptions=counts.num_preemptions,
        num_images_encoded=counts.num_images_encoded,
        image_cache_hits=images.num_hits,
        image_cache_misses=images.num_misses,
        image_cache_evictions=images.num_evictions,
        prefix_tokens_queried=counts.prefix_tokens_queried,
        prefix_tokens_hit=counts.prefix_tokens_hit,
        num_drafts=counts.drafts.num_rows,
        num_draft_tokens=counts.drafts.num_tokens,
        num_accepted_tokens=counts.drafts.num_accepted,
    )


def add_adapters(stats: EngineStats, sequences: Iterable[Sequence]) -> None:
    """Add how many of these open answers run and wait, by the name of their adapter."""
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for sequence in sequences:
        if name := sequence.adapter_name:
            counts = running if sequence.status is Status.RUNNING else waiting
            counts[name] += 1
    stats.running_adapters, stats.waiting_adapters = dict(running), dict(waiting)
