"""Rows of several adapters in one step, against the merged model alone.

float32 on a CPU, logits at every position within 1e-4 of the oracle's whose weights have the
adapter merged, on a random checkpoint with all gates at 0.7.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import MIXED
from support.coded_checkpoints import FORMS
from support.coded_checkpoints import write as write_coded
from support.oracle import (
    BLOCK_SIZE,
    Request,
    checkpoint,
    generate,
    image,
    image_arguments,
    loaded,
    oracle,
    prefill_logits,
    prompt,
)
from support.thread_ranks import on_ranks
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from vlmserve.models.batch import AdapterRef, PoolSizes
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora import rows as lora_rows
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.models.weights.device_map import given_map, on_one_device
from vlmserve.models.weights.loader import LoadedModel, load, load_model, open_checkpoint

TOLERANCE = 1e-4
LAYOUT = "tiny"
TEXTS = {"text": "only words", "one": "|what is it?", "two": "a|b|c and more"}


@functools.cache
def merged(name: str) -> MllamaForConditionalGeneration:
    """The oracle with an adapter in its weights; without one for no name."""
    return MIXED[name].merged(oracle(LAYOUT)) if name else oracle(LAYOUT)


def runner_of(model: LoadedModel, refs: dict[str, AdapterRef], max_loras: int = 8) -> ModelRunner:
    sizes = PoolSizes(400, 120, BLOCK_SIZE)
    limits = AdapterLimits(max_loras, 16, torch.float32)
    runner = ModelRunner(model, PoolPlan(sizes, 400 * BLOCK_SIZE), None, limits)
    assert runner.adapters is not None
    for ref in refs.values():
        runner.adapters.read(ref)
    return runner


def requests(refs: dict[str, AdapterRef], names: Sequence[str], seed: int = 0) -> list[Request]:
    """A text and two prompts with images for each adapter of `names`; an empty name has none."""
    found = []
    for number, name in enumerate(names):
        for kind, text in TEXTS.items():
            pictures = [
                image(1 + (number + i) % 8, 10 * number + i) for i in range(text.count("|"))
            ]
            request = prompt(f"{kind} {name} {number}", text, pictures)
            request.adapter = refs[name].digest if name else ""
            found.append(request)
    np.random.default_rng(seed).shuffle(found)
    return found


@torch.inference_mode()
def expected(name: str, request: Request) -> Tensor:
    ids = torch.tensor([request.token_ids])
    output = merged(name)(input_ids=ids, use_cache=False, **image_arguments(request))
    return output.logits[0].float()


def assert_as_merged(
    refs: dict[str, AdapterRef], batch: Sequence[Request], logits: dict[str, Tensor]
) -> None:
    names = {ref.digest: name for name, ref in refs.items()} | {"": ""}
    for request in batch:
        torch.testing.assert_close(
            logits[request.request_id],
            expected(names[request.adapter], request),
            atol=TOLERANCE,
            rtol=0.0,
        )


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_eight_adapters_and_none_in_one_step_equal_the_merged_models(refs, chunk):
    batch = requests(refs, ["", *MIXED])
    logits = prefill_logits(runner_of(loaded(LAYOUT), refs), batch, chunk)
    assert_as_merged(refs, batch, logits)


def test_each_adapter_changes_what_it_says(refs):
    """Otherwise the comparison with merged models would prove nothing."""
    runner = runner_of(loaded(LAYOUT), refs)
    for name, ref in refs.items():
        info = runner.adapters.read(ref)
        seeing, blind = (
            prompt(kind, TEXTS[kind], [image(2, 1)][: kind == "one"]) for kind in ("one", "text")
        )
        for request, is_changed in (
            (seeing, info.changes_text or info.changes_images),
            (blind, info.changes_text),
        ):
            change = (expected(name, request) - expected("", request)).abs().max()
            assert (change > 1e-2) == is_changed, (name, request.request_id)
    infos = {name: runner.adapters.read(ref) for name, ref in refs.items()}
    assert [name for name, one in infos.items() if not one.changes_text] == ["vision", "image-keys"]
    assert [name for name, one in infos.items() if not one.changes_images] == ["output"]


def test_rows_of_one_adapter_beside_rows_of_none(refs, monkeypatch):
    """One group, in one piece and not, gathered in parts."""
    monkeypatch.setattr(lora_rows, "MAX_GATHERED_ROWS", 7)
    for names in (["all"], ["all", "", "all"], ["qv", ""]):
        batch = requests(refs, names, seed=len(names))
        logits = prefill_logits(runner_of(loaded(LAYOUT), refs), batch, 4)
        assert_as_merged(refs, batch, logits)


def test_separate_and_batched_products_are_both_used_and_equal(refs, monkeypatch):
    taken = []
    for name in ("_change_batched", "_change_group"):
        plain = getattr(lora_rows, name)

        def counted(*args, plain=plain, name=name):
            taken.append(name)
            plain(*args)

        monkeypatch.setattr(lora_rows, name, counted)
    batch = requests(refs, ["", *MIXED])
    for request in batch:
        request.images = []
    batch = [one for one in batch if one.request_id.startswith("text")]
    prefill_logits(runner_of(loaded(LAYOUT), refs), batch, 1)
    assert "_change_batched" in taken
    taken.clear()
    batch = requests(refs, ["qv", "all"])
    prefill_logits(runner_of(loaded(LAYOUT), refs), batch, 1000)
    assert set(taken) == {"_change_group"}


def test_a_step_without_adapters_takes_the_plain_operations(refs, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("adapters were applied")

    runner = runner_of(loaded(LAYOUT), refs)
    monkeypatch.setattr("vlmserve.models.lora.store.StepAdapters.__init__", forbidden)
    batch = requests(refs, [""])
    assert_as_merged(refs, batch, prefill_logits(runner, batch, 1000))


def test_a_decoder_of_transformers_layers_takes_adapters_too(refs):
    """As with a device map or bitsandbytes, whose layers are not joined."""
    opened = open_checkpoint(checkpoint(LAYOUT), torch.float32)
    placement = on_one_device(opened.meta_model, torch.device("cpu"))
    model = load(opened, placement, is_fused=False)
    batch = requests(refs, ["", *MIXED])
    logits = prefill_logits(runner_of(model, refs), batch, 5)
    assert_as_merged(refs, batch, logits)


def test_two_ranks_apply_their_shares_of_the_adapters(refs):
    """A and B are cut as the layers are; changes of a rank's inputs are summed over the ranks."""

    def compute(group):
        model = load_model(checkpoint(LAYOUT), "cpu", "float32", None, group)
        runner = runner_of(model, refs)
        return prefill_logits(runner, requests(refs, ["", *MIXED]), chunk=6)

    first, second = on_ranks(2, compute)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_as_merged(refs, requests(refs, ["", *MIXED]), first)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_adapters_are_added_to_quantized_weights(refs, quantize):
    """Logits differ from the unquantized model's with the same adapters by the quantization."""
    model = load_model(checkpoint(LAYOUT), "cpu", "float32", quantize)
    runner, plain = runner_of(model, refs), runner_of(loaded(LAYOUT), refs)
    batch = [one for one in requests(refs, ["", "all", "text"]) if one.request_id[:3] != "two"]
    logits = prefill_logits(runner, batch, 1000)
    whole = prefill_logits(plain, again(batch), 1000)
    changed = prefill_logits(runner, again(batch, keeps_adapters=False), 1000)
    for request in batch:
        name = request.request_id
        error, change = ((logits[name] - other[name]).abs().mean() for other in (whole, changed))
        # the adapter moves the logits, and quantization moves them much less
        assert error < 0.15
        if request.adapter:
            assert change > 3 * error


@pytest.mark.parametrize(
    "form",
    [
        "nf4-nested",
        pytest.param("gptq-act-order", marks=pytest.mark.slow),
        pytest.param("fp8-channel", marks=pytest.mark.slow),
        "w8a8",
    ],
)
def test_adapters_on_a_quantized_checkpoint_equal_those_on_its_dequantized_weights(
    refs, form, tmp_path
):
    """nf4-nested is what QLoRA trains on."""
    folders = write_coded(Path(checkpoint(LAYOUT)), FORMS[form], tmp_path)
    batch = [one for one in requests(refs, ["", "all", "text"]) if one.request_id[:3] != "two"]
    coded, plain = (
        prefill_logits(runner_of(load_model(one, "cpu", "float32"), refs), again(batch), 5)
        for one in folders
    )
    for name, logits in plain.items():
        torch.testing.assert_close(coded[name], logits, atol=TOLERANCE, rtol=TOLERANCE)
    base = prefill_logits(
        runner_of(load_model(folders[0], "cpu", "float32"), refs), again(batch, False), 5
    )
    for one in batch:
        change = (coded[one.request_id] - base[one.request_id]).abs().max()
        assert (change > 1e-2) == bool(one.adapter)


def again(batch: Sequence[Request], keeps_adapters: bool = True) -> list[Request]:
    """The same requests before they were computed."""
    found = []
    for request in batch:
        fresh = prompt(request.request_id, "x")
        fresh.token_ids, fresh.images = request.token_ids, request.images
        fresh.spans, fresh.num_prompt_tokens = request.spans, request.num_prompt_tokens
        fresh.adapter = request.adapter if keeps_adapters else ""
        found.append(fresh)
    return found


def test_parts_that_a_device_map_offloads_take_adapters_too(refs):
    """The vision model and a decoder layer are on disk, and loaded for each call."""
    opened = open_checkpoint(checkpoint(LAYOUT), torch.float32)
    places = {"": "cpu", "model.vision_model": "disk", "model.language_model.layers.0": "disk"}
    model = load(opened, given_map(places, opened.meta_model, 0, "map"))
    batch = requests(refs, ["", "all", "qv", "vision"])
    assert_as_merged(refs, batch, prefill_logits(runner_of(model, refs), batch, 1000))


def test_greedy_tokens_of_mixed_adapters_are_those_of_the_merged_models(refs):
    batch = requests(refs, ["", *MIXED])
    generate(runner_of(loaded(LAYOUT), refs), batch, num_tokens=6, chunk=5)
    names = {ref.digest: name for name, ref in refs.items()} | {"": ""}
    for request in batch:
        rows = expected(names[request.adapter], request)[request.num_prompt_tokens - 1 : -1]
        for token_id, row in zip(request.generated, rows, strict=True):
            best = row.topk(2)
            is_tie = best.values[0] - best.values[1] < TOLERANCE
            assert token_id == best.indices[0] or (is_tie and token_id == best.indices[1])
