"""A step between two layers of another one: the logits of both are those of each alone."""

from __future__ import annotations

import pytest
import torch
from support.oracle import Blocks, Request, join, prompt, requests, runner, schedule
from torch import Tensor

from vlmserve.models.batch import StepBatch
from vlmserve.models.execution.runner import ModelRunner

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 6  # of the tiny layout


def prefill(blocks: Blocks, asked: list[Request]) -> StepBatch:
    return join([schedule(one, len(one.token_ids), blocks) for one in asked])


def decode(blocks: Blocks, asked: list[Request]) -> StepBatch:
    for one in asked:
        one.token_ids.append(7)
    return join([schedule(one, 1, blocks) for one in asked])


class InsertedAt:
    """Computes `batch` before a layer of the outer step, counted from 0."""

    def __init__(self, model: ModelRunner, batch: StepBatch, layer: int) -> None:
        self._model, self._batch, self._layer = model, batch, layer
        self.num_calls = 0
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        if self.num_calls == self._layer:
            self.logits = self._model.compute_logits(self._batch)
        self.num_calls += 1


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_step_before_any_layer_of_another_changes_nothing_in_either(layer: int) -> None:
    asked, new = requests(), prompt("new", "abcabca")
    model = runner("tiny")
    blocks = Blocks(model.info.pools, 0)
    steps = [prefill(blocks, asked), prefill(blocks, [new]), decode(blocks, [*asked, new])]
    alone = [model.compute_logits(one) for one in steps]

    again = runner("tiny")
    inside = InsertedAt(again, steps[1], layer)
    assert again.call_between_layers(inside)
    outer = again.compute_logits(steps[0])
    assert inside.num_calls == NUM_LAYERS, "the layers of the step inside do not count"
    assert inside.logits is not None
    torch.testing.assert_close(outer, alone[0], atol=0.0, rtol=0.0)
    torch.testing.assert_close(inside.logits, alone[1], atol=0.0, rtol=0.0)
    torch.testing.assert_close(again.compute_logits(steps[2]), alone[2], atol=0.0, rtol=0.0)


def test_the_vision_seconds_of_a_step_are_not_those_of_the_step_inside() -> None:
    model, asked, new = runner("tiny"), requests("one"), prompt("new", "abcabca")
    blocks = Blocks(model.info.pools, 0)
    outer, inner = prefill(blocks, asked), prefill(blocks, [new])
    results = []

    def insert() -> None:
        if not results:
            results.append(model.execute(inner))

    assert model.call_between_layers(insert)
    results.append(model.execute(outer))
    assert results[0].vision_seconds == 0.0
    assert results[1].vision_seconds > 0.0
    assert [set(one.token_ids) for one in results] == [{"new"}, {"one"}]


def test_an_error_inside_is_the_callbacks_and_the_next_step_calls_it_again() -> None:
    model, new = runner("tiny"), prompt("new", "abcabca")
    batch = prefill(Blocks(model.info.pools, 0), [new])
    calls = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("inside")

    assert model.call_between_layers(fail_once)
    with pytest.raises(ValueError, match="inside"):
        model.execute(batch)
    model.execute(batch)
    assert len(calls) > 1


def test_two_steps_one_after_the_other_inside_a_long_one_change_nothing_in_it() -> None:
    asked = requests()
    news = [prompt(name, name * 3) for name in ("new", "other")]
    model = runner("tiny")
    blocks = Blocks(model.info.pools, 0)
    outer = prefill(blocks, asked)
    inside = [prefill(blocks, [one]) for one in news]
    last = decode(blocks, [*asked, *news])
    alone = [model.compute_logits(one) for one in (outer, *inside, last)]

    again = runner("tiny")
    places = [InsertedAt(again, step, layer) for step, layer in zip(inside, (1, 4), strict=True)]
    assert again.call_between_layers(lambda: [place() for place in places])
    found = again.compute_logits(outer)
    torch.testing.assert_close(found, alone[0], atol=0.0, rtol=0.0)
    for place, expected in zip(places, alone[1:3], strict=True):
        assert place.logits is not None
        torch.testing.assert_close(place.logits, expected, atol=0.0, rtol=0.0)
    torch.testing.assert_close(again.compute_logits(last), alone[3], atol=0.0, rtol=0.0)
