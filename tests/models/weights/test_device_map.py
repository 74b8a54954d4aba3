"""Device maps: what they may say, where automatic ones put things, and that a model which is
offloaded or split answers as the whole one does."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from support.oracle import (
    BLOCK_SIZE,
    PROMPTS,
    checkpoint,
    loaded,
    prefill_logits,
    requests,
)

from vlmserve.models.batch import PoolSizes
from vlmserve.models.decoder.multi_device import SPLIT_ATTENTION_NAME
from vlmserve.models.decoder.packed_linear import PackedLinear, can_pack
from vlmserve.models.errors import ModelError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights import device_map
from vlmserve.models.weights.device_map import (
    Placement,
    automatic,
    given_map,
    parts_of,
    read_device_map,
)
from vlmserve.models.weights.loader import Checkpoint, LoadedModel, load, open_checkpoint

CPU = torch.device("cpu")
META = torch.device("meta")
LAYERS = "model.language_model.layers"
PLAN = PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800)
# whole modules and single ones, from each kind of part
DISK_MAPS: dict[str, dict[str, Any]] = {
    "a self layer": {"": "cpu", f"{LAYERS}.5": "disk"},
    "a cross layer": {"": "cpu", f"{LAYERS}.3": "disk"},
    "every other layer": {"": "cpu"} | {f"{LAYERS}.{i}": "disk" for i in (0, 2, 4)},
    "the vision model": {"": "cpu", "model.vision_model": "disk"},
    "embedding, norm and head": {
        "": "cpu",
        "model.language_model.embed_tokens": "disk",
        "model.language_model.norm": "disk",
        "lm_head": "disk",
    },
    "everything": {"": "disk"},
}


@functools.cache
def opened(dtype: torch.dtype = torch.float32) -> Checkpoint:
    return open_checkpoint(checkpoint("tiny"), dtype)


def placed(entries: Mapping[str, Any], num_gpus: int = 0) -> Placement:
    return given_map(entries, opened().meta_model, num_gpus, "map.json")


def logits_of(model: LoadedModel, *names: str) -> dict[str, torch.Tensor]:
    return prefill_logits(ModelRunner(model, PLAN), requests(*names), chunk=7)


# --- maps --------------------------------------------------------------------------------------


def test_the_longest_name_of_a_map_says_where_a_part_lies() -> None:
    found = placed({"": 0, "model.language_model": 1, f"{LAYERS}.5": "cpu", "lm_head": "cuda:2"}, 3)
    assert found.places["model.vision_model"] == 0
    assert found.places[f"{LAYERS}.4"] == 1
    assert found.places[f"{LAYERS}.5"] == "cpu"
    assert found.places["lm_head"] == 2
    assert found.device_of(f"{LAYERS}.5") == torch.device("cuda", 0)
    assert found.layer_devices() == [torch.device("cuda", 1)] * 5 + [torch.device("cuda", 0)]
    assert found.devices() == [torch.device("cuda", index) for index in (0, 1, 2)]
    assert found.is_offloaded


def test_weights_that_only_lie_on_the_cpu_are_held_by_it_and_visit_the_gpu() -> None:
    found = placed({"": 0, f"{LAYERS}.5": "cpu", "lm_head": "disk"}, 1)
    gpu = torch.device("cuda", 0)
    assert found.holders() == [gpu, CPU]
    assert found.holds(CPU, f"{LAYERS}.5")
    assert not found.holds(gpu, f"{LAYERS}.5")
    assert not any(found.holds(device, "lm_head") for device in (CPU, gpu))
    assert placed({"": 0}, 1).holders() == [gpu]


def test_every_part_of_the_model_has_a_place_and_no_weight_lies_outside_of_parts() -> None:
    parts = parts_of(opened().meta_model)
    for name, _ in [*opened().meta_model.named_parameters(), *opened().meta_model.named_buffers()]:
        assert sum(name.startswith(f"{part}.") for part in parts) == 1, name


def test_a_map_of_one_device_is_no_split() -> None:
    assert placed({"": "cpu"}).device_map == {"": CPU}
    assert placed({"": 1}, 2).single == torch.device("cuda", 1)
    assert not placed({"": "cpu"}).is_offloaded


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown module": ({"": 0, "model.layers": 0}, "has no module 'model.layers'"),
    "half a layer": (
        {"": 0, f"{LAYERS}.3.mlp": "cpu"},
        f"splits {LAYERS}.3, which must stay whole",
    ),
    "half the vision model": (
        {"": 0, "model.vision_model.transformer": "cpu"},
        "splits model.vision_model",
    ),
    "a part left out": ({"model": 0}, "lm_head has no place: add it"),
    "a device that is none": ({"": "tpu"}, "'tpu' is not a place"),
    "a place that is no word": ({"": ["cpu"]}, "is not a place"),
    "true": ({"": True}, "True is not a place"),
    "a GPU that is not there": ({"": 1}, r"GPU 1 does not exist \(1 CUDA devices\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_map_is_refused_in_one_line_with_its_file(what: str, tmp_path: Path) -> None:
    entries, message = WRONG[what]
    file = tmp_path / "map.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ModelError, match=message) as raised:
        read_device_map(file, opened().meta_model, num_gpus=1)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_map_that_is_no_file_is_refused_with_what_it_may_be() -> None:
    with pytest.raises(ModelError, match="'automatic' is neither auto, balanced nor a file"):
        read_device_map(Path("automatic"), opened().meta_model, 0)


# --- automatic maps ----------------------------------------------------------------------------

SIZES = {"vision": 20, "a": 10, "b": 10, "c": 10, "head": 10}
CACHES = {"a": 1, "b": 1, "c": 1}


def test_auto_takes_one_gpu_where_the_model_fits_it() -> None:
    assert automatic("auto", SIZES, {0: 62, 1: 63, "cpu": 100}, CACHES).single == torch.device(
        "cuda", 1
    )


def test_balanced_spreads_over_all_gpus_and_auto_does_where_one_is_too_small() -> None:
    for kind, room in (("balanced", 100), ("auto", 50)):
        found = automatic(kind, SIZES, {0: room, 1: room, "cpu": 100}, CACHES)
        assert set(found.places.values()) == {0, 1}
        assert list(found.places.values()) == sorted(found.places.values(), key=str)


def test_what_no_gpu_takes_goes_to_the_cpu_and_then_to_disk() -> None:
    found = automatic("auto", SIZES, {0: 55, "cpu": 21}, CACHES)
    assert list(found.places.values()) == [0, 0, "cpu", "cpu", "disk"]
    assert found.main == torch.device("cuda", 0)


def test_a_cpu_alone_keeps_what_it_can_and_leaves_memory_for_weights_from_disk() -> None:
    found = automatic("auto", SIZES, {"cpu": 60}, CACHES)
    assert list(found.places.values()) == ["cpu", "cpu", "disk", "disk", "disk"]
    assert automatic("auto", SIZES, {"cpu": 63}, CACHES).single == CPU


@pytest.mark.parametrize("room", range(24, 140, 4))
def test_no_gpu_is_given_more_than_its_room(room: int) -> None:
    for kind in ("auto", "balanced"):
        places = automatic(kind, SIZES, {0: room, 1: room, "cpu": 1000}, CACHES).places
        assert set(places) == set(SIZES)
        for gpu in (0, 1):
            held = sum(size for part, size in SIZES.items() if places[part] == gpu)
            assert held <= room


# --- offloaded and split models ----------------------------------------------------------------


@functools.cache
def whole_logits(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = loaded("tiny") if dtype is torch.float32 else _whole(dtype)
    return logits_of(model)


def _whole(dtype: torch.dtype) -> LoadedModel:
    return load(opened(dtype), device_map.on_one_device(opened(dtype).meta_model, CPU))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", DISK_MAPS)
def test_a_model_with_parts_on_disk_answers_as_the_whole_one(name: str, dtype: torch.dtype) -> None:
    """The whole one's layers are fused, which rounds otherwise; beside those on disk none is."""
    model = load(opened(dtype), placed(DISK_MAPS[name]))
    on_disk = [part for part, place in model.placement.places.items() if place == "disk"]
    assert on_disk
    for part in on_disk:
        for weight in model.model.get_submodule(part).parameters():
            assert weight.device == META, part
    tolerance = 2e-6 if dtype is torch.float32 else 0.05
    for prompt, logits in logits_of(model).items():
        expected = whole_logits(dtype)[prompt]
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, prompt


def test_linear_layers_that_stay_are_packed_beside_layers_on_disk() -> None:
    if not can_pack(torch.ones(1, dtype=torch.bfloat16)):
        pytest.skip("this CPU or torch does not pack bfloat16 weights")
    model = load(opened(torch.bfloat16), placed({"": "cpu", f"{LAYERS}.5": "disk"})).model
    kinds = [type(model.get_submodule(f"{LAYERS}.{i}.mlp.up_proj")) for i in (4, 5)]
    assert kinds == [PackedLinear, torch.nn.Linear]


def test_offloading_writes_nothing_beside_the_checkpoint() -> None:
    folder = Path(checkpoint("tiny"))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    logits_of(load(opened(), placed({"": "disk"})), "one")
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_part_computes_where_accelerate_hooks_take_its_inputs() -> None:
    """`Placement.device_of` must say what accelerate does."""
    model = load(opened(), placed({"": "cpu", f"{LAYERS}.3": "disk", "lm_head": "disk"}))
    for part in model.placement.places:
        for module in model.model.get_submodule(part).modules():
            if (hook := getattr(module, "_hf_hook", None)) is not None:
                assert torch.device(hook.execution_device) == model.placement.device_of(part), part


@pytest.mark.parametrize("method", ["bitsandbytes", "bitsandbytes-nf4"])
def test_quantized_weights_are_not_offloaded(method: str) -> None:
    with pytest.raises(
        ModelError, match=f"--quantize {method} does not work with weights offloaded"
    ):
        load(opened(), placed({"": "cpu", "lm_head": "disk"}), method)


@pytest.mark.parametrize(
    "method",
    [None, pytest.param("bitsandbytes", marks=pytest.mark.slow), "bitsandbytes-nf4"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_change_nothing_whatever_the_linear_layers_are(
    method: str | None, dtype: torch.dtype
) -> None:
    """Hooks as a split over GPUs attaches them, on one CPU, around packed and quantized layers."""
    placed_on_cpu = device_map.on_one_device(opened().meta_model, CPU)
    plain = load(opened(dtype), placed_on_cpu, method, is_fused=False)
    hooked = load(opened(dtype), placed_on_cpu, method, is_fused=False)
    dispatch_model(hooked.model, dict(hooked.placement.places), force_hooks=True)
    assert hasattr(hooked.model.get_submodule(f"{LAYERS}.0"), "_hf_hook")
    # the same rows in each product: the sums of more rows may be ordered otherwise
    found = logits_of(hooked, "apart", "text")
    for name, logits in logits_of(plain, "apart", "text").items():
        assert torch.equal(found[name], logits)


def split_over(first_on_meta: int) -> LoadedModel:
    """The tiny model, its layers from that one on, norm and head on a second device.

    That is torch's meta device, the only other one that a CPU has: it computes shapes.
    """
    on_cpu = load(opened(), device_map.on_one_device(opened().meta_model, CPU), is_fused=False)
    names = list(on_cpu.placement.places)
    first = names.index(f"{LAYERS}.{first_on_meta}")
    places = {name: "cpu" if i < first else "meta" for i, name in enumerate(names)}
    dispatch_model(on_cpu.model, places, main_device="cpu")
    on_cpu.text_config._attn_implementation = SPLIT_ATTENTION_NAME
    return replace(on_cpu, placement=Placement(places))


@pytest.mark.parametrize("first_on_meta", [1, 3, 5])
def test_a_step_over_two_devices_computes_each_layer_on_its_own(first_on_meta: int) -> None:
    model = split_over(first_on_meta)
    runner = ModelRunner(model, PLAN)
    assert [layer.keys.device for layer in runner.pools.layers] == [
        META if index >= first_on_meta else CPU for index in range(6)
    ]
    asked = requests("apart", "text")
    num_tokens = [len(one.token_ids) for one in asked]
    logits = prefill_logits(runner, asked, chunk=6)
    assert {one.device for one in logits.values()} == {META}
    assert [logits[one.request_id].shape[0] for one in asked] == num_tokens


def test_the_layers_before_the_border_hold_the_keys_of_the_whole_model() -> None:
    whole, split = ModelRunner(loaded("tiny"), PLAN), ModelRunner(split_over(4), PLAN)
    for runner in (whole, split):
        prefill_logits(runner, [PROMPTS["apart"]()], chunk=6)
    for one, other in list(zip(whole.pools.layers, split.pools.layers, strict=True))[:4]:
        assert one.keys.any()
        # the whole one's layers are fused, which rounds otherwise
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=0.0)


def test_the_way_of_a_split_step_gives_the_logits_of_the_plain_one() -> None:
    """Two devices' plans and slots, while all layers lie on the first."""
    model = load(opened(), device_map.on_one_device(opened().meta_model, CPU), is_fused=False)
    plain = logits_of(model)
    model.text_config._attn_implementation = SPLIT_ATTENTION_NAME
    runner = ModelRunner(model, PLAN)
    runner._layer_devices = [CPU, META]
    logits = prefill_logits(runner, requests(), chunk=7)
    for name, expected in plain.items():
        assert torch.equal(logits[name], expected)
