"""Samples behind drafts, and accepts the drafts that the model would have sampled itself.

Owns the places of a step: every position behind which a token is sampled, one a sequence and one
more for each of its drafts. Knows nothing of where drafts come from.

At each place a token is sampled from the logits, the context and the random number of that place. A
draft is accepted if it equals that token. So answers are the same as without drafts, for any
sampling parameters: no distribution is changed, and no probability of a draft is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..batch import (
    Accepted,
    SamplingContext,
    SamplingParams,
    ScheduledSequence,
    StepResult,
    TokenLogprobs,
)


@dataclass(slots=True, frozen=True)
class Places:
    """The places of the sequences that sample, in their order.

    firsts: the first place of each sequence. params, indices, contexts: one a place.
    """

    sequences: Sequence[ScheduledSequence]
    firsts: list[int]
    params: list[SamplingParams]
    indices: list[int]
    contexts: list[SamplingContext | None]

    @classmethod
    def of(cls, sequences: Sequence[ScheduledSequence]) -> Places:
        """The places of sequences with `sampling`."""
        places = cls(sequences, [], [], [], [])
        for one in sequences:
            assert one.sampling is not None
            places.firsts.append(len(places.params))
            places.params.extend([one.sampling] * (1 + one.num_drafts))
            places.indices.extend(range(one.sample_index, one.sample_index + 1 + one.num_drafts))
            places.contexts.append(one.context)
            places.contexts.extend(one.draft_contexts or [None] * one.num_drafts)
        return places

    def result_of(self, token_ids: list[int], logprobs: dict[int, TokenLogprobs]) -> StepResult:
        """The step's result. token_ids: of each place; logprobs: of the places that request them.

        A token counts if all drafts of its sequence in front of it were right.
        """
        result = StepResult({})
        for first, one in zip(self.firsts, self.sequences, strict=True):
            result.token_ids[one.request_id] = token_ids[first]
            if first in logprobs:
                result.logprobs[one.request_id] = logprobs[first]
            num_right = _num_right(drafts_of(one), token_ids[first : first + one.num_drafts])
            if num_right:
                more = range(first + 1, first + 1 + num_right)
                result.accepted[one.request_id] = Accepted(
                    [token_ids[place] for place in more],
                    [logprobs[place] for place in more if place in logprobs],
                )
        return result


def drafts_of(sequence: ScheduledSequence) -> list[int]:
    """The tokens of a row that are drafts."""
    return sequence.token_ids[len(sequence.token_ids) - sequence.num_drafts :]


def _num_right(drafts: list[int], sampled: list[int]) -> int:
    """How many drafts, from the first, are the tokens sampled in front of them."""
    pairs = enumerate(zip(drafts, sampled, strict=True))
    return next((place for place, (draft, token) in pairs if draft != token), len(drafts))
