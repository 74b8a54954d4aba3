"""What `bench/drafts.py` measures: texts that repeat, and answers written behind the sampling."""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import replace

import pytest

from drafts import Side, Written, compute_prompts, loop_of, requests_of
from engine_requests import open_runner
from repeating_texts import KINDS, texts_of


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_s_figures_stand_in_its_prompt(kind: str) -> None:
    prompt, answer = texts_of(kind, 3, 6)
    assert texts_of(kind, 3, 6) == (prompt, answer)
    assert texts_of(kind, 4, 6) != (prompt, answer)
    figures = re.findall(r"\d[\d.-]+\d", answer)
    assert len(figures) > 3
    assert set(figures) <= set(re.findall(r"\d[\d.-]+\d", prompt))


def test_written_answers_are_given_with_drafts_and_without() -> None:
    runner, written = open_runner("", dtype="float32", device="cpu"), Written()
    args = argparse.Namespace(answer=60, records=3)
    requests, written.answers = requests_of(runner, args, "question", 2)
    written.place_behind(runner)
    loop = loop_of(runner, 2, 8)
    # each step takes a second of this clock: drafts pay as soon as they are right
    clock = itertools.count().__next__
    drafted, plain = (Side(loop, clock, has_drafts) for has_drafts in (True, False))
    for side in (drafted, drafted, plain):
        counts = replace(loop.scheduler.counts().drafts)
        side.start_round()
        compute_prompts(loop, requests, clock)
        while side.step():
            pass
        for one in loop.scheduler.take_started():
            assert (
                one.token_ids[len(one.request.prompt_token_ids) :]
                == written.answers[one.sequence_id]
            )
    assert counts.num_accepted > 10
    assert drafted.num_steps < 59
    assert loop.scheduler.counts().drafts == counts
    assert plain.num_steps == 59
