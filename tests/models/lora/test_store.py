"""Which adapters are in slots, and every file that is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import MIXED, Adapter, by_old_name, by_text_name, written
from support.oracle import BLOCK_SIZE, Blocks, join, loaded, oracle, prompt, schedule
from torch import Tensor

from vlmserve.models.batch import AdapterRef, PoolSizes, StepBatch
from vlmserve.models.errors import AdapterError, StepError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora.files import WEIGHTS, digest_of
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.models.lora.reader import layer_name
from vlmserve.models.lora.store import AdapterStore

LAYOUT = "tiny"
Q = "model.language_model.layers.0.self_attn.q_proj"


def runner(max_loras: int = 2) -> ModelRunner:
    sizes = PoolSizes(60, 20, BLOCK_SIZE)
    limits = AdapterLimits(max_loras, 16, torch.float32)
    return ModelRunner(loaded(LAYOUT), PoolPlan(sizes, 60 * BLOCK_SIZE), None, limits)


def store() -> AdapterStore:
    return AdapterStore(loaded(LAYOUT), AdapterLimits(1, 16, torch.float32))


def step(model: ModelRunner, *digests: str) -> StepBatch:
    blocks, batches = Blocks(model.info.pools), []
    for number, digest in enumerate(digests):
        request = prompt(str(number), "abc")
        request.adapter = digest
        batches.append(schedule(request, 3, blocks))
    return join(batches)


def test_a_step_is_computed_in_the_order_of_its_slots(refs):
    """So the rows of an adapter are in one piece; each request gets its own token all the same."""
    model = runner(max_loras=2)
    a, b = (refs[name].digest for name in ("all", "text"))
    model.adapters.read(refs["all"])
    model.adapters.read(refs["text"])
    alone = {one: model.execute(step(model, one)).token_ids["0"] for one in (a, b, "")}
    mixed = step(model, "", b, a, "", b, a)
    assert [one.adapter for one in model.adapters.in_order(mixed).sequences] == [
        *([a] * 2), *([b] * 2), *([""] * 2)
    ]  # fmt: skip
    found = model.execute(mixed).token_ids
    assert found == {one.request_id: alone[one.adapter] for one in mixed.sequences}
    assert len(set(alone.values())) > 1
    same = step(model, a, a)
    assert model.adapters.in_order(same) is same


# --- slots ----------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_leaves_its_slot(refs):
    model = runner(max_loras=2)
    a, b, c = (refs[name].digest for name in ("all", "qv", "text"))
    for name in ("all", "qv", "text"):
        model.adapters.read(refs[name])
    for digests, expected in (
        ([a], [a]),
        ([b, ""], [a, b]),
        ([a, a], [b, a]),
        ([c], [a, c]),
        ([""], [a, c]),
        ([b, c], [c, b]),
    ):
        model.execute(step(model, *digests))
        assert sorted(model.adapters.in_slots) == sorted(expected)
    assert model.adapters.num_loads == 4


def test_an_adapter_of_the_step_never_leaves_for_another_of_it(refs):
    """The least recently used one is in the step, and stays."""
    model = runner(max_loras=2)
    a, b, c = (refs[name].digest for name in ("all", "qv", "text"))
    for ref in refs.values():
        model.adapters.read(ref)
    model.execute(step(model, a))
    model.execute(step(model, b))
    model.execute(step(model, c, a))
    assert sorted(model.adapters.in_slots) == sorted([a, c])


def test_results_do_not_depend_on_what_was_in_the_slot(refs):
    """A slot's ranks beyond its adapter's are zero: one with higher ranks was there before."""
    model = runner(max_loras=1)
    for ref in refs.values():
        model.adapters.read(ref)
    first = {}
    for names in (MIXED, reversed(MIXED), MIXED):
        for name in names:
            logits = model.compute_logits(step(model, refs[name].digest))
            torch.testing.assert_close(logits, first.setdefault(name, logits), atol=0.0, rtol=0.0)
    assert model.adapters.num_loads >= 2 * len(MIXED)


def test_a_step_with_more_adapters_than_slots_fails_before_anything_changes(refs):
    model = runner(max_loras=2)
    for ref in refs.values():
        model.adapters.read(ref)
    model.execute(step(model, refs["all"].digest))
    before = model.adapters.in_slots
    with pytest.raises(StepError, match="3 adapters; max_loras is 2"):
        model.execute(step(model, *(refs[name].digest for name in ("qv", "text", "mlp"))))
    assert model.adapters.in_slots == before


def test_an_adapter_that_was_not_read_fails_the_step_alone(refs):
    model = runner()
    with pytest.raises(StepError, match="has not been read"):
        model.execute(step(model, refs["all"].digest))
    model.execute(step(model, ""))
    without = ModelRunner(loaded(LAYOUT), PoolPlan(PoolSizes(60, 20, BLOCK_SIZE), 240))
    assert without.adapters is None
    with pytest.raises(StepError, match="max_loras is 0"):
        without.execute(step(without, refs["all"].digest))


def test_a_forgotten_adapter_leaves_first_and_can_be_read_again(refs):
    model = runner(max_loras=2)
    a, b, c = (refs[name].digest for name in ("all", "qv", "text"))
    for name in ("all", "qv", "text"):
        model.adapters.read(refs[name])
    model.execute(step(model, a))
    model.execute(step(model, b))
    model.adapters.forget(b)  # the most recently used
    model.execute(step(model, c))
    assert sorted(model.adapters.in_slots) == sorted([a, c])
    with pytest.raises(StepError, match="has not been read"):
        model.execute(step(model, b))
    model.adapters.read(refs["qv"])
    model.execute(step(model, b))


def test_adapters_are_read_by_other_threads_while_steps_run(refs):
    model = runner(max_loras=2)
    model.adapters.read(refs["all"])
    errors = []

    def read() -> None:
        try:
            for _ in range(5):
                for ref in refs.values():
                    model.adapters.read(ref)
                    if ref.name != "all":
                        model.adapters.forget(ref.digest)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model.execute(step(model, refs["all"].digest, ""))
    assert not errors


def test_a_digest_is_read_once_under_any_name(refs):
    found = store()
    info = found.read(refs["all"])
    nowhere = AdapterRef("other", "/nowhere", refs["all"].digest)
    assert found.read(nowhere) is info
    found.forget(nowhere.digest)
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        found.read(nowhere)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("base_model.model.model.language_model.layers.3.mlp.up_proj", None),
        ("base_model.model.language_model.model.layers.3.mlp.up_proj", None),
        ("base_model.model.model.layers.3.mlp.up_proj", None),
        ("base_model.model.language_model.layers.3.mlp.up_proj", None),
        ("model.language_model.layers.3.mlp.up_proj", None),
        ("base_model.model.vision_model.transformer.layers.0.mlp.fc1", "vision_model"),
        ("base_model.model.model.vision_model.transformer.layers.0.mlp.fc1", "vision_model"),
        ("base_model.model.multi_modal_projector", "multi_modal_projector"),
        ("base_model.model.model.multi_modal_projector", "multi_modal_projector"),
    ],
)
def test_names_of_both_lines_of_transformers_are_known(source, name):
    expected = "model.language_model.layers.3.mlp.up_proj"
    if name == "vision_model":
        expected = "model.vision_model.transformer.layers.0.mlp.fc1"
    if name == "multi_modal_projector":
        expected = "model.multi_modal_projector"
    assert layer_name(source) == expected


def test_info_counts_ranks_and_bytes(tmp_path):
    adapter = Adapter(r".*layers\.0\.self_attn\.(q|v)_proj", rank=4, ranks={"q_proj": 6})
    info = store().read(adapter.write(tmp_path, oracle(LAYOUT)))
    sizes = sum(
        adapter.rank_of(name) * (layer.in_features + layer.out_features) * 4
        for name, layer in adapter.layers(oracle(LAYOUT)).items()
    )
    assert (info.rank, info.num_bytes) == (6, sizes)
    assert info.base_model == "meta-llama/Llama-3.2-11B-Vision-Instruct"


def test_a_name_of_peft_with_its_adapter_is_read(tmp_path):
    """As in a state that was saved without peft: lora_A.default.weight."""
    adapter = Adapter(r".*layers\.0\.self_attn\.q_proj")
    tensors = {
        name.replace(".weight", ".default.weight"): one
        for name, one in adapter.tensors(oracle(LAYOUT)).items()
    }
    assert store().read(written(tmp_path, adapter.config(), tensors)).rank == 4


Tensors = dict[str, Tensor]


def edited(change: Callable[[Tensors], object], settings: dict) -> tuple[dict, Tensors]:
    """The files of a small adapter after a change."""
    targets = r"model\.language_model\.layers\.[01]\.self_attn\.(q|k)_proj"
    adapter = Adapter(targets, settings=settings)
    tensors = adapter.tensors(oracle(LAYOUT))
    change(tensors)
    return adapter.config(), tensors


A, B = (f"base_model.model.{Q}.lora_{matrix}.weight" for matrix in "AB")
HEAD = "base_model.model.lm_head"
# a change of the tensors and what the error names
WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (lambda t: t[A].fill_(math.nan), rf"{Q}\.lora_A\.weight has values that are NaN"),
    "inf": (lambda t: t[B].view(-1)[3:4].fill_(math.inf), r"lora_B\.weight has values"),
    "inputs": (lambda t: t.update({A: t[A][:, 1:]}), r"q_proj\.lora_A\.weight has the shape"),
    "outputs": (lambda t: t.update({B: t[B][1:]}), r"q_proj\.lora_B\.weight has the shape"),
    "rank of A": (lambda t: t.update({A: t[A][1:]}), r"the configured rank need \[4, "),
    "flat": (lambda t: t.update({A: t[A].flatten()}), r"lora_A\.weight has the shape"),
    "whole numbers": (lambda t: t.update({A: t[A].int()}), r"stored as torch\.int32"),
    "no B": (lambda t: t.pop(B), rf"{Q}\.lora_B\.weight is missing"),
    "no A": (lambda t: t.pop(A), rf"{Q}\.lora_A\.weight is missing"),
    "a layer too many": (
        lambda t: t.update({B.replace("layers.0", "layers.99"): t[B]}),
        r"layers\.99\.self_attn\.q_proj: the model has no such layer",
    ),
    "head": (
        lambda t: t.update({f"{HEAD}.lora_A.weight": t[A]}),
        r"lm_head: an adapter of the head is not served",
    ),
    "DoRA": (
        lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): t[A]}),
        r"lora_magnitude_vector.* belongs to DoRA",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.embed_tokens.lora_embedding_A": t[A]}),
        r"changes an embedding",
    ),
    "whole layer": (
        lambda t: t.update({f"{HEAD}.modules_to_save.weight": t[A]}),
        r"is a whole layer",
    ),
    "bias": (lambda t: t.update({B.replace("weight", "bias"): t[B]}), "is a bias"),
    "other": (lambda t: t.update({"something": t[A]}), "something is not a weight of LoRA"),
    "empty": (lambda t: t.clear(), r"adapter_model\.safetensors has no weights"),
    "twice": (
        lambda t: t.update({A.replace(Q, by_old_name(Q)): t[A]}),
        "is twice in .*under an old and a new name",
    ),
}
WRONG_SETTINGS: dict[str, tuple[dict, str]] = {
    "scale": ({"lora_alpha": 1e42}, r"lora_B\.weight has values"),
    "rank": ({"r": 17}, r"has rank 17; --max-lora-rank is 16"),
    "rank of a pattern": (
        {"rank_pattern": {"k_proj": 32}},
        r"k_proj has rank 32; --max-lora-rank is 16",
    ),
    "a target without weights": (
        {"target_modules": ["q_proj", "v_proj"]},
        "has no weights of v_proj, which target_modules names",
    ),
}


@pytest.mark.parametrize("name", [*WRONG_TENSORS, *WRONG_SETTINGS])
def test_a_wrong_tensor_is_named_in_one_line(tmp_path, name):
    change, reason = WRONG_TENSORS.get(name, (lambda t: None, ""))
    settings, reason = WRONG_SETTINGS.get(name, ({}, reason))
    with pytest.raises(AdapterError, match=reason) as caught:
        store().read(written(tmp_path, *edited(change, settings)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)  # a client may read it


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_named(tmp_path, keep):
    ref = MIXED["qv"].write(tmp_path, oracle(LAYOUT))
    file = Path(ref.folder) / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged") as caught:
        store().read(AdapterRef("cut", ref.folder, digest_of(ref.folder)))
    assert "\n" not in str(caught.value)


def test_values_too_large_for_the_slots_type_are_named(tmp_path):
    adapter = Adapter(r".*layers\.0\.self_attn\.q_proj")
    tensors = {name: one * 1e6 for name, one in adapter.tensors(oracle(LAYOUT)).items()}
    ref = written(tmp_path, adapter.config(), tensors)
    halves = AdapterStore(loaded(LAYOUT), AdapterLimits(1, 16, torch.float16))
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        halves.read(ref)
    assert store().read(ref).rank == 4


def test_an_adapter_of_the_text_model_alone_is_read(tmp_path):
    adapter = Adapter(r"model\.language_model.*q_proj", rename=by_text_name)
    assert store().read(adapter.write(tmp_path, oracle(LAYOUT))).changes_text
