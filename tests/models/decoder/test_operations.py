"""The kernels between a decoder's products against torch's operations, and whole models with them.

On a CPU they run in Triton's interpreter. Tolerance: 1e-5 in float32.
"""

from __future__ import annotations

import tempfile

import pytest
import torch
from support.oracle import (
    BLOCK_SIZE,
    checkpoint,
    loaded,
    oracle_logits,
    prefill_logits,
    requests,
)
from torch import nn

from vlmserve.bench.checkpoints import build
from vlmserve.models.attention.sdpa import SdpaBackend
from vlmserve.models.batch import PoolSizes
from vlmserve.models.decoder import kernel_launch, operations
from vlmserve.models.decoder.decoder import FusedDecoder, is_fused
from vlmserve.models.decoder.int8 import product
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.quantizer import quantize
from vlmserve.models.decoder.linear_products import product_of
from vlmserve.models.decoder.operations import (
    CompiledOperations,
    Heads,
    LayerOperations,
    Rotation,
    Stream,
    TrialSizes,
    TritonOperations,
    choose_operations,
    trial_pairs,
)
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kernels import c_library, row_operations
from vlmserve.models.kernels.self_test import are_usable, what_is_wrong
from vlmserve.models.kv_cache.paged_cache import LayerCache
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.device_map import on_one_device
from vlmserve.models.weights.loader import load, load_model, open_checkpoint

DEVICES = [
    pytest.param("cpu", id="interpreter"),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]
PLAN = PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("has_gate", "has_mask"), [(False, False), (True, False), (True, True)])
@torch.inference_mode()
def test_a_sum_and_the_norm_after_it_are_torchs(
    device: str, has_gate: bool, has_mask: bool
) -> None:
    torch.manual_seed(0)
    product = product_of([nn.Linear(20, 72, bias=False, device=device)])
    states, hidden = torch.randn(5, 20, device=device), torch.randn(5, 72, device=device)
    weight, gate = torch.rand(72, device=device) + 0.5, torch.tensor([0.3], device=device)
    mask = torch.tensor([1.0, 0, 1, 1, 0], device=device)[:, None] if has_mask else None
    results = []
    for one in (LayerOperations(), TritonOperations()):
        stream = Stream(hidden.clone())
        if has_gate:
            one.add_gated(stream, product, states, gate, mask)
        else:
            one.add(stream, product, states)
        normed = one.norm(stream, weight, 1e-5)
        results.append((stream.hidden, normed))
        assert stream.update is None
    for expected, actual in zip(*results, strict=True):
        assert_equal(actual, expected)


@torch.inference_mode()
def test_a_norm_is_of_the_sum_as_it_is_rounded(device: str) -> None:
    """In float16; the interpreter cuts off what bfloat16 would round."""
    torch.manual_seed(0)
    hidden, update = torch.randn(2, 5, 72, device=device).half().unbind()
    weight = (torch.rand(72, device=device) + 0.5).half()
    summed, normed = kernel_launch.add_norm(hidden, update, weight, 1e-5)
    assert torch.equal(summed, hidden + update)
    exact = nn.functional.rms_norm(summed.double(), (72,), weight.double(), 1e-5)
    is_near = (normed.double() - exact).abs() <= 1.01 * 2.0**-11 * exact.abs()
    assert is_near.all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 24)])
@torch.inference_mode()
def test_rotation_and_write_are_torchs_and_negative_slots_are_skipped(
    device: str, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    heads = Heads(num_heads, num_kv_heads, head_dim)
    joined = torch.randn(3, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    angles = torch.rand(3, head_dim // 2, device=device).repeat(1, 2)
    rotation = Rotation(angles.cos(), angles.sin())
    shape = (4, 2, num_kv_heads, head_dim)
    caches = [LayerCache(*torch.zeros(2, *shape, device=device).unbind()) for _ in range(2)]
    slots, backend = torch.tensor([5, 0, 7], device=device), SdpaBackend()
    expected, actual = (
        one.rotate_and_write(joined, heads, rotation, cache, slots, backend)
        for one, cache in zip((LayerOperations(), TritonOperations()), caches, strict=True)
    )
    assert_equal(actual, expected)
    assert_equal(caches[1].keys, caches[0].keys)
    assert_equal(caches[1].values, caches[0].values)
    before = caches[1].keys.clone()
    nowhere = torch.full_like(slots, -1)
    TritonOperations().rotate_and_write(-joined, heads, rotation, caches[1], nowhere, backend)
    assert torch.equal(caches[1].keys, before)


@pytest.mark.parametrize("width", [48, 1500])
@torch.inference_mode()
def test_a_gated_middle_is_torchs(device: str, width: int) -> None:
    joined = torch.randn(4, 2 * width, generator=torch.Generator().manual_seed(0)).to(device)
    expected = LayerOperations().gated(joined, nn.SiLU())
    assert_equal(TritonOperations().gated(joined, nn.SiLU()), expected)


@torch.inference_mode()
def test_a_models_own_activation_is_computed_by_the_kernel(monkeypatch) -> None:
    """transformers' SiLU is no `nn.SiLU`, so that models never came to the kernel."""
    calls, launch = [], kernel_launch.silu_gated
    monkeypatch.setattr(kernel_launch, "silu_gated", lambda x: calls.append(x) or launch(x))
    layer = loaded("tiny").model.model.language_model.layers[0]
    joined = torch.randn(4, 32)
    expected = LayerOperations().gated(joined, nn.SiLU())
    assert_equal(TritonOperations().gated(joined, layer._mlp._act), expected)
    assert len(calls) == 1


@torch.inference_mode()
def test_another_activation_than_silu_is_left_to_torch() -> None:
    joined = torch.randn(4, 32)
    expected = LayerOperations().gated(joined, nn.GELU())
    assert_equal(TritonOperations().gated(joined, nn.GELU()), expected)


def test_a_cpu_keeps_torchs_operations() -> None:
    chosen = operations.choose_operations(
        torch.device("cpu"), torch.float32, operations.TrialSizes()
    )
    assert type(chosen) is LayerOperations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_of_the_kernels_finds_nothing_wrong(device: str, dtype: torch.dtype) -> None:
    place = torch.device(device)
    assert what_is_wrong(lambda: trial_pairs(TritonOperations(), place, dtype)) is None
    assert what_is_wrong(lambda: product.trial_pairs(place, dtype)) is None


@pytest.mark.parametrize("name", ["add_norm", "rotate_and_write", "silu_gated"])
def test_a_kernel_that_errs_or_fails_is_found_by_the_trial(monkeypatch, name: str) -> None:
    """A machine without a C compiler ended at the first step."""
    right = getattr(kernel_launch, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        for one in result if isinstance(result, tuple) else (result,):
            one[1, ..., 0] += 0.5
        return result

    def failing(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.")

    def trial():
        return trial_pairs(TritonOperations(), torch.device("cpu"), torch.float32)

    monkeypatch.setattr(kernel_launch, name, wrong)
    assert "off by" in str(what_is_wrong(trial))
    monkeypatch.setattr(kernel_launch, name, failing)
    expected = "the trial failed: RuntimeError: Failed to find C compiler."
    assert what_is_wrong(trial) == expected


def test_a_gpu_whose_kernels_fail_computes_by_torch_and_says_why(monkeypatch, caplog) -> None:
    def trial():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not are_usable("norms", torch.device("cuda"), trial)
    assert caplog.messages == [
        "norms use torch's operations: the trial failed: RuntimeError: Failed to find C compiler."
    ]
    assert are_usable("norms", torch.device("cuda"), lambda: [(torch.ones(2), torch.ones(2))])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not are_usable("norms", torch.device("cuda"), list)
    assert caplog.messages[-1].endswith("compute capability 7.5 is below 8.0")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tiny", "cross-first"])
def test_a_model_of_kernels_gives_the_oracles_logits(layout: str) -> None:
    """float32, 1e-4; every prompt at every position, in chunks, batched."""
    runner = ModelRunner(loaded(layout), PLAN)
    text_model = loaded(layout).model.model.language_model
    runner._fused = FusedDecoder(text_model, TritonOperations())
    logits = prefill_logits(runner, requests(), chunk=5)
    for request in requests():
        expected = oracle_logits(layout, request)
        torch.testing.assert_close(logits[request.request_id], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_int8_layers_of_the_same_states_are_one_product_side_by_side() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(width, 48) for width in (32, 16)]
    linears = [Int8Linear(quantize(weight, torch.float32)) for weight in weights]
    states, addend = torch.randn(5, 48), torch.randn(5, 48)
    expected = torch.cat([linear(states) for linear in linears], dim=-1)
    assert_equal(product_of(linears)(states), expected)
    assert_equal(product_of(linears).plus(states, addend), expected + addend)


def test_a_model_of_int8_weights_is_fused_and_gives_what_it_gives_unfused() -> None:
    """float32, 1e-4."""
    fused = load_model(checkpoint("tiny"), "cpu", "float32", "int8")
    assert is_fused(fused.model.model.language_model)
    opened = open_checkpoint(checkpoint("tiny"), torch.float32)
    placement = on_one_device(opened.meta_model, torch.device("cpu"))
    unfused = load(opened, placement, "int8", is_fused=False)
    assert not is_fused(unfused.model.model.language_model)
    told = [prefill_logits(ModelRunner(one, PLAN), requests(), 5) for one in (fused, unfused)]
    for name, logits in told[0].items():
        torch.testing.assert_close(logits, told[1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_parts_of_joined_weights_are_given_back_to_the_gpu() -> None:
    """They stayed in torch's cache, where the pools could not have them."""
    folder = build("m100", tempfile.mkdtemp(prefix="vlmserve-"), with_processor=False)
    model = load_model(folder, "cuda", "bfloat16")
    assert is_fused(model.model.model.language_model)
    allocated = torch.cuda.memory_allocated(model.device)
    assert torch.cuda.memory_reserved(model.device) < 1.2 * allocated + (32 << 20)


@pytest.fixture
def compiled() -> CompiledOperations:
    if not row_operations.fits(torch.float32, 128, 64):
        pytest.skip("no C compiler")
    return CompiledOperations()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("hidden", [256, 100, 7])
@torch.inference_mode()
def test_compiled_operations_are_torchs(
    compiled: CompiledOperations, hidden: int, dtype: torch.dtype, atol: float
) -> None:
    sizes = TrialSizes(hidden, 160, Heads(6, 2, 96))
    for actual, expected in trial_pairs(compiled, torch.device("cpu"), dtype, sizes):
        torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=atol)


@torch.inference_mode()
def test_compiled_silu_is_torchs_over_its_whole_range(compiled: CompiledOperations) -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4000), torch.tensor([0.0, 1e30, 1e-30])])
    gate = torch.cat([gate, torch.zeros(-len(gate) % 16)])
    found = compiled.gated(torch.cat([gate, torch.ones(len(gate))])[None], nn.SiLU())[0]
    expected = nn.functional.silu(gate.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-36, rtol=1e-6)
    extreme = torch.tensor([-1e30, float("nan")]).repeat(8)
    found = compiled.gated(torch.cat([extreme, torch.ones(16)])[None], nn.SiLU())[0]
    assert found[::2].abs().max() < 1e-8
    assert found[1::2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_compiled_row_has_the_same_bits_whatever_rows_are_beside_it(
    compiled: CompiledOperations, dtype: torch.dtype
) -> None:
    """Also where threads share the rows: 500 x 300 numbers."""
    torch.manual_seed(0)
    states, weight = torch.randn(500, 300).to(dtype), torch.rand(300).to(dtype)
    joined, heads = torch.randn(500, 8 * 64).to(dtype), Heads(4, 2, 64)
    cos, sin = (torch.randn(500, 32).repeat(1, 2).to(dtype) for _ in range(2))

    def results(rows: slice) -> list[torch.Tensor]:
        cache = LayerCache(*(torch.zeros(1, 500, 2, 64, dtype=dtype) for _ in range(2)))
        slots = torch.arange(500)[rows]
        part, rotation = joined[rows], Rotation(cos[rows], sin[rows])
        query = compiled.rotate_and_write(part, heads, rotation, cache, slots, SdpaBackend())
        written = [one[0, rows] for one in cache.tensors]
        normed = compiled.norm(Stream(states[rows]), weight, 1e-5)
        return [normed, query, compiled.gated(part, nn.SiLU()), *written]

    whole = results(slice(0, 500))
    for rows in (slice(0, 1), slice(499, 500), slice(3, 20), slice(100, 400)):
        for found, expected in zip(results(rows), whole, strict=True):
            assert torch.equal(found, expected[rows])


def test_only_large_models_are_compiled_for_and_only_if_allowed(
    compiled: CompiledOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    large, small = TrialSizes(512, 128), TrialSizes(256, 128)
    assert type(choose_operations(cpu, torch.float32, large)) is CompiledOperations
    assert type(choose_operations(cpu, torch.float32, small)) is LayerOperations
    assert type(choose_operations(cpu, torch.float16, large)) is LayerOperations
    with c_library.allowed(False):
        assert type(choose_operations(cpu, torch.float32, large)) is LayerOperations
    monkeypatch.setattr(row_operations, "silu_gated", lambda joined: joined[:, :128] + 1)
    monkeypatch.setattr(operations, "_has_c", operations._has_c.__wrapped__)
    assert type(choose_operations(cpu, torch.float32, large)) is LayerOperations
