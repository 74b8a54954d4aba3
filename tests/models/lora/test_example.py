"""The example adapter: the bundled model answers in German."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from support.client_environments import ROOT

from vlmserve.models.batch import (
    AdapterRef,
    CrossSegment,
    PoolSizes,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
)
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.dataset.data import conversation, training_scene
from vlmserve.models.bundled.dataset.tokenizer import Message
from vlmserve.models.bundled.exam.exam import Result, exam
from vlmserve.models.bundled.exam.grading import Grader
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora.files import WEIGHTS, digest_of
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.models.lora.reader import ReadLimits, read_adapter
from vlmserve.models.lora.sites import sites_of
from vlmserve.models.weights.loader import load_model
from vlmserve.models.weights.tensor_loader import WHOLE

FOLDER = ROOT / "examples" / "german"
MAX_BYTES = 300_000
# questions about what a picture does not show are harder for so small an adapter
LEARNED_WELL = ("describe", "colour", "background", "count", "list", "small_talk")
LEAST_RIGHT, LEAST_RIGHT_WELL = 0.65, 0.85


@pytest.fixture(scope="module")
def answers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("german_answers", FOLDER / "answers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("english", "german"),
    [
        (
            "There is a red circle and a blue star on a white background.",
            "Es gibt einen roten Kreis und einen blauen Stern auf weißem Hintergrund.",
        ),
        ("There are two purple squares.", "Es gibt zwei lila Quadrate."),
        ("There are no shapes on an orange background.",
         "Es gibt keine Formen auf orange Hintergrund."),
        ("There is one triangle.", "Es gibt ein Dreieck."),
        ("No, there is no green star.", "Nein, es gibt keinen grünen Stern."),
        ("Yes, the background is gray.", "Ja, der Hintergrund ist grau."),
        ("The yellow shape is a square.", "Die gelbe Form ist ein Quadrat."),
        ("There is no black shape.", "Es gibt keine schwarze Form."),
        ("You are welcome.", "Gern geschehen."),
    ],
)  # fmt: skip
def test_an_answer_is_put_into_german(answers, english, german):
    assert answers.german(english) == german


def test_every_answer_of_the_training_has_a_translation(answers):
    rng = np.random.default_rng(0)
    words = re.compile(r"\b(the|there|is|shape|background|red|picture)\b", re.IGNORECASE)
    for _ in range(400):
        for message in conversation(rng, training_scene(rng, 4)):
            if message.role == "assistant":
                assert not words.search(answers.german(message.text))
    with pytest.raises(ValueError, match="no German for"):
        answers.german("Something else entirely.")


def test_the_example_is_small():
    size = sum((FOLDER / name).stat().st_size for name in (WEIGHTS, "adapter_config.json"))
    assert size <= MAX_BYTES


@pytest.mark.slow
def test_the_merged_model_answers_held_out_questions_in_german(answers):
    """Exactly, word for word, greedily, about pictures of one and two shapes."""
    ref = AdapterRef("german", str(FOLDER), digest_of(FOLDER))
    adapter = read_adapter(
        ref,
        sites_of(load_model(CHECKPOINT, "cpu", "float32")),
        ReadLimits(8, torch.float32, WHOLE),
    )
    assert (adapter.info.changes_text, adapter.info.changes_images) == (True, False)
    grader = Grader.load(CHECKPOINT)
    for site, weights in adapter.weights.items():
        parts = {part.begin: part.name for part in site.parts}
        for row, column, block in weights.blocks:
            layer = grader.model.get_submodule(parts[column])
            layer.weight.data += block.T @ weights.a[row : row + len(block)]
    items = [replace(i, answer=answers.german(i.answer), history=()) for i in exam(6, 1, (1, 2))]
    results = grader.grade(items)
    assert share(results) >= LEAST_RIGHT
    assert share([one for one in results if one.item.type in LEARNED_WELL]) >= LEAST_RIGHT_WELL


def share(results: list[Result]) -> float:
    return sum(one.is_right for one in results) / len(results)


def test_german_and_english_are_answered_in_one_step(answers):
    """Greedy, by the runner: the same question twice, with the adapter and without."""
    sizes = PoolSizes(40, 4, 16)
    model = load_model(CHECKPOINT, "cpu", "float32")
    limits = AdapterLimits(1, 8, torch.float32)
    runner = ModelRunner(model, PoolPlan(sizes, 320), None, limits)
    digest = digest_of(FOLDER)
    runner.adapters.read(AdapterRef("german", str(FOLDER), digest))
    encoder = Grader.load(CHECKPOINT).encoder
    ids = encoder.encode([Message("user", "Thank you!")], with_generation_prompt=True).ids
    tokens = {"": list(ids), digest: list(ids)}
    start = 0
    for _ in range(16):
        rows = [
            ScheduledSequence(
                request_id=name,
                token_ids=found[start:],
                start=start,
                block_ids=[20 * (name != "") + block for block in range(-(-len(found) // 16))],
                segments=[CrossSegment(len(found) - start, [])],
                sampling=SamplingParams(temperature=0.0),
                adapter=name,
            )
            for name, found in tokens.items()
        ]
        start = len(tokens[""])
        for name, token_id in runner.execute(StepBatch(rows)).token_ids.items():
            tokens[name].append(token_id)
    texts = [encoder._backend.decode(one[len(ids) :]) for one in tokens.values()]
    assert texts[0].startswith("You are welcome.")
    assert texts[1].startswith("Gern geschehen.")
