"""Checkpoints that the tools themselves quantize, from the bundled model.

Each tool runs in an environment of its own (`requirements/quantizers/`; bitsandbytes is in the
tests' own), and decodes what it packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.coded_checkpoints import kept_and_counted
from support.oracle import BLOCK_SIZE, Request, generate, image, prefill_logits, prompt
from support.quantizers import FORMS, run_tool

from vlmserve.models.batch import PoolSizes
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.exam.exam import Item, exam
from vlmserve.models.bundled.exam.grading import Grader
from vlmserve.models.checkpoint import check_folder
from vlmserve.models.decoder.mllama_fixes import mend
from vlmserve.models.errors import ModelError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import load_model, open_checkpoint
from vlmserve.models.weights.tensor_loader import WHOLE, Recipe, load_tensors, open_tensors

pytestmark = pytest.mark.slow
TILE_SIZE = 56
# right answers that a form may lose, of the exam's
MAY_LOSE = {8: 1, 4: 4}


def picture(aspect_ratio_id: int, seed: int):
    return image(aspect_ratio_id, seed, tile_size=TILE_SIZE)


REQUESTS: dict[str, Callable[[], Request]] = {
    "text": lambda: prompt("text", "only words, and a few more"),
    "one": lambda: prompt("one", "|what is in it?", [picture(2, 1)]),
    "apart": lambda: prompt("apart", "|first then |second", [picture(5, 5), picture(3, 6)]),
}


@pytest.fixture(
    scope="module",
    params=[(tool, form) for tool, forms in FORMS.items() for form in forms],
    ids=lambda pair: "-".join(pair),
)
def made(request, tmp_path_factory) -> tuple[Path, Path, int]:
    """A tool's checkpoint, its dequantized one, and the right answers that it may lose."""
    tool, form = request.param
    folder = tmp_path_factory.mktemp(form)
    coded, dequantized = folder / "coded", folder / "dequantized"
    run_tool(tool, CHECKPOINT, form, coded, dequantized)
    return coded, dequantized, MAY_LOSE[FORMS[tool][form]]


def runner_of(folder: Path) -> ModelRunner:
    sizes = PoolSizes(200, 40, BLOCK_SIZE)
    return ModelRunner(load_model(folder, "cpu", "float32"), PoolPlan(sizes, 800))


def test_logits_are_those_of_the_weights_that_the_tool_itself_decodes(made) -> None:
    coded, dequantized, _ = made
    assert open_checkpoint(coded, torch.float32).is_coded
    runner, plain = runner_of(coded), runner_of(dequantized)
    for make in REQUESTS.values():
        found, expected = (prefill_logits(one, [make()], chunk=5) for one in (runner, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_tokens_are_those_of_the_decoded_weights_alone_and_in_mixes(made) -> None:
    coded, dequantized, _ = made
    answers = []
    for runner in (runner_of(coded), runner_of(dequantized)):
        together = [make() for make in REQUESTS.values()]
        generate(runner, together, num_tokens=12, chunk=7)
        alone = [make() for make in REQUESTS.values()]
        for one in alone:
            generate(runner, [one], num_tokens=12, chunk=50)
        answers += [[one.generated for one in together], [one.generated for one in alone]]
    assert answers == [answers[0]] * 4


def test_weights_take_what_the_arithmetic_says(made) -> None:
    kept, counted, plain = kept_and_counted(made[0], CHECKPOINT)
    assert kept == pytest.approx(counted, rel=0.1)
    assert kept < 0.5 * plain


@functools.cache
def questions() -> list[Item]:
    return exam(8, seed=5, shapes=(1, 2))


@functools.cache
def right_answers(folder: Path) -> int:
    """The exam's right answers of a checkpoint, by its own layers, in float32."""
    opened = open_checkpoint(folder, torch.float32)
    recipe = Recipe(torch.device("cpu"), torch.float32, WHOLE)
    tensors = open_tensors(folder, opened.tensors)
    model = load_tensors(tensors, opened.meta_model.config, recipe, lambda _: None, str(folder))
    grader = Grader(mend(model.eval().requires_grad_(False)), Grader.load(CHECKPOINT).encoder)
    return sum(result.is_right for result in grader.grade(questions()))


def test_the_exam_has_nearly_all_right_answers(made, record_property) -> None:
    """The tool's own weights would give the same: the logits are equal."""
    coded, _, may_lose = made
    whole, found = right_answers(CHECKPOINT), right_answers(coded)
    record_property("right answers", f"{found} of {len(questions())}, {whole} unquantized")
    assert found >= whole - may_lose


# --- PEFT -----------------------------------------------------------------------------------------


def test_weights_that_peft_merged_load_under_its_prefix(tmp_path) -> None:
    saved, merged = tmp_path / "saved", tmp_path / "merged"
    run_tool("peft", CHECKPOINT, "merged", saved, merged)
    for quantize in (None, "int8"):
        found, expected = (
            load_model(folder, "cpu", "float32", quantize=quantize).model.state_dict()
            for folder in (saved, merged)
        )
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one)
    plain = load_model(CHECKPOINT, "cpu", "float32").model.state_dict()
    assert any(not torch.equal(plain[name], one) for name, one in expected.items())


def test_an_adapter_that_peft_saved_is_named(tmp_path) -> None:
    saved = tmp_path / "saved"
    run_tool("peft", CHECKPOINT, "adapter", saved, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"this is a LORA adapter of .*merge_and_unload"):
        check_folder(saved)


def test_a_model_with_an_adapter_in_it_is_named(tmp_path) -> None:
    saved = tmp_path / "saved"
    run_tool("peft", CHECKPOINT, "in-weights", saved, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"LoRA adapter that is not merged .*merge_and_unload"):
        load_model(saved, "cpu", "float32")
