"""What must hold on a GPU the first time that there is one: kernels and models at published sizes.

Each test also runs on a CPU, at small sizes and with the kernels in Triton's interpreter, so that
what is asked of a GPU is known to be askable. References are computed in float32 or float64.
Tolerances: of kernels as in test_attention.py, of logits as a share of their root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.attention_cases import (
    Subject,
    attend,
    dense,
    interpreted,
    make_case,
    needs_interpreter,
    on_cuda,
)
from support.oracle import (
    BLOCK_SIZE,
    Blocks,
    Request,
    checkpoint,
    dequantize,
    generate,
    image,
    prefill_logits,
    prompt,
    requests,
    schedule,
)
from support.sampled import context_of, sample
from support.taped import TapeRecorder, tape_operations, taped_backend
from torch import nn

from vlmserve.bench.checkpoints import layout
from vlmserve.models.attention import AttentionBackend, get_backend
from vlmserve.models.attention.sdpa import SdpaBackend
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.batch import (
    ImageToEncode,
    PoolSizes,
    SamplingParams,
    StepBatch,
)
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder.decoder import FusedDecoder, is_fused
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.product import fused_product
from vlmserve.models.decoder.int8.quantizer import quantize
from vlmserve.models.decoder.operations import (
    Heads,
    LayerOperations,
    Rotation,
    Stream,
    TritonOperations,
)
from vlmserve.models.execution.graphs.recorder import CudaRecorder, Recorder
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.paged_cache import LayerCache, poison_blocks
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.device_map import on_one_device
from vlmserve.models.weights.loader import LoadedModel, load, load_model
from vlmserve.models.weights.random_weights import random_checkpoint

HAS_CUDA = torch.cuda.is_available()
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device"),
]
PLAN = PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Place:
    """Where a test computes, in what, and whether the kernels are the interpreter's."""

    device: str
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


CPU = pytest.param(Place("cpu", torch.float32), id="interpreter", marks=needs_interpreter())
GPU = [
    pytest.param(Place("cuda", dtype), id=f"cuda-{name}", marks=ON_GPU)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
]
PLACES = [CPU, *GPU]
SLOW_CPU = pytest.param(*CPU.values, id=CPU.id, marks=[*CPU.marks, pytest.mark.slow])


def assert_near(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of a dtype, of the largest number."""
    tolerance = ROUNDING[dtype] * exact.abs().max().item()
    torch.testing.assert_close(actual.double().cpu(), exact.double().cpu(), atol=tolerance, rtol=0)


# --- attention at the published geometry -------------------------------------------------------

SUBJECTS = [interpreted("triton-interpreter"), *map(on_cuda, ("sdpa", "triton", "flash_attn"))]
ROWS = {
    "one decode": [(1, 1_301)],
    "decodes": [(1, 40 + 37 * row) for row in range(64)],
    "a prompt": [(700, 700)],
    "a chunk beside decodes": [(300, 900), *[(1, 100 + row) for row in range(8)]],
}
SEEN = {
    "one sees an image": [(1, 4)],
    "decodes that see images and none": [(1, row % 5) for row in range(16)],
    "a chunk and decodes": [(60, 4), (1, 0), (1, 2), (5, 3)],
}


def check_attention(subject: Subject, lens: list[tuple[int, int]], is_causal: bool) -> None:
    is_cuda = subject.device == "cuda"
    heads: dict[str, Any] = {"num_kv_heads": 8, "group": 4, "head_dim": 128}
    if not is_cuda:
        heads = {"num_kv_heads": 1, "group": 2, "head_dim": 32}
    num_patches = 1601 if is_cuda else 23
    block_size = max(16, subject.block_multiple) if is_causal else num_patches
    rows = lens if is_causal else [(queries, tiles * num_patches) for queries, tiles in lens]
    if not is_cuda:
        rows = [(q if q == k else min(q, 20), k if q != k else min(k, 50)) for q, k in rows[:6]]
        rows = [(min(q, k), k) if is_causal else (q, k) for q, k in rows]
    for dtype in subject.dtypes[:2]:
        case = make_case(rows, is_causal=is_causal, block_size=block_size, dtype=dtype, **heads)
        scale = heads["head_dim"] ** -0.5
        output, exact = attend(subject, case, scale), dense(case, scale)
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("lens", ROWS.values(), ids=ROWS)
def test_text_rows_of_the_published_geometry(subject: Subject, lens) -> None:
    check_attention(subject, lens, is_causal=True)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("lens", SEEN.values(), ids=SEEN)
def test_image_rows_of_the_published_geometry(subject: Subject, lens) -> None:
    check_attention(subject, lens, is_causal=False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("piece", [64, 128, 192, 1024])
def test_pieces_of_every_size_give_the_same(place: Place, piece: int) -> None:
    heads = {"num_kv_heads": 8, "group": 4, "head_dim": 128}
    heads = heads if place.is_cuda else {"num_kv_heads": 1, "group": 2, "head_dim": 16}
    lens = [(1, 700), (1, 5), (1, 130)] if place.is_cuda else [(1, 70), (1, 5)]
    case = make_case(lens, is_causal=True, block_size=16, dtype=place.dtype, **heads)
    subject = Subject(lambda: TritonBackend(piece), 1, place.device)
    scale = heads["head_dim"] ** -0.5
    assert_near(attend(subject, case, scale), dense(case, scale), place.dtype)


# --- kernels between the products, and int8 ----------------------------------------------------


def numbers(*shape: int, place: Place, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(place.device, place.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
@pytest.mark.parametrize(("has_gate", "has_mask"), [(False, False), (True, False), (True, True)])
@torch.inference_mode()
def test_a_sum_and_its_norm_are_those_of_float32(
    place: Place, num_tokens: int, has_gate: bool, has_mask: bool
) -> None:
    width = 4096 if place.is_cuda else 48
    hidden, update = (numbers(num_tokens, width, place=place, seed=seed) for seed in (1, 2))
    weight = numbers(width, place=place, seed=3)
    gate = torch.full((1,), 0.3, device=place.device, dtype=place.dtype) if has_gate else None
    mask = None
    if has_mask:
        mask = (torch.arange(num_tokens, device=place.device) % 2).to(place.dtype)[:, None]
    stream = Stream(hidden.clone(), update.clone(), gate, mask)
    normed = TritonOperations().norm(stream, weight, 1e-5)
    factor = (1.0 if gate is None else gate.float()) * (1.0 if mask is None else mask.float())
    total = hidden.float() + update.float() * factor
    assert_near(stream.hidden, total, place.dtype)
    rounded = stream.hidden.float()
    scale = torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-5)
    assert_near(normed, rounded * scale * weight.float(), place.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_tokens", [1, 37])
@torch.inference_mode()
def test_rotation_and_write_are_those_of_float32(place: Place, num_tokens: int) -> None:
    heads = Heads(32, 8, 128) if place.is_cuda else Heads(4, 2, 16)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    joined = numbers(num_tokens, width, place=place)
    angles = torch.rand(num_tokens, heads.head_dim // 2).repeat(1, 2).to(place.device)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_tokens]
    slots = slots.to(place.device)
    results = []
    for one, dtype in (
        (LayerOperations(), torch.float32),
        (TritonOperations(), place.dtype),
    ):
        shape = (4, 16, heads.num_kv_heads, heads.head_dim)
        cache = LayerCache(*torch.zeros(2, *shape, device=place.device, dtype=dtype).unbind())
        # both begin with the rounded cosines
        cos, sin = (part.to(place.dtype).to(dtype) for part in (angles.cos(), angles.sin()))
        query = one.rotate_and_write(
            joined.to(dtype), heads, Rotation(cos, sin), cache, slots, SdpaBackend()
        )
        results.append((query, cache.keys, cache.values))
    for exact, actual in zip(*results, strict=True):
        assert_near(actual, exact, place.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_tokens", [1, 64])
@torch.inference_mode()
def test_a_gated_middle_is_that_of_float32(place: Place, num_tokens: int) -> None:
    width = 14_336 if place.is_cuda else 1500
    joined = numbers(num_tokens, 2 * width, place=place)
    exact = LayerOperations().gated(joined.float(), nn.SiLU())
    assert_near(TritonOperations().gated(joined, nn.SiLU()), exact, place.dtype)


SHAPES = {
    "qkv": (4096, 6144),
    "out": (4096, 4096),
    "gate and up": (4096, 28_672),
    "down": (14_336, 4096),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_rows", [1, 8, 17, 64])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_an_int8_product_is_that_of_the_dequantized_weight(
    place: Place, num_rows: int, num_in: int, num_out: int
) -> None:
    if not place.is_cuda:
        num_in, num_out = num_in // 64, num_out // 128
    packed = quantize(numbers(num_out, num_in, place=place, seed=1), place.dtype)
    rows = numbers(num_rows, num_in, place=place)
    exact = rows.float() @ (packed.codes.float() * packed.scales.float()[:, None]).T
    assert_near(fused_product(rows, packed.codes, packed.scales), exact, place.dtype)


@pytest.mark.parametrize("place", PLACES)
@torch.inference_mode()
def test_few_and_many_rows_of_an_int8_layer_agree(place: Place) -> None:
    """What a decode step and a prefill take: the fused kernel, and unpacked weights."""
    width = 4096 if place.is_cuda else 96
    layer = Int8Linear(quantize(numbers(width, width, place=place, seed=1), place.dtype))
    rows = numbers(300, width, place=place)
    exact = (
        rows.float()
        @ dequantize(quantize(numbers(width, width, place=place, seed=1), torch.float32)).T
    )
    for part in (rows, rows[:7]):
        # codes are made with scales that are rounded to the dtype
        error = (layer(part).float() - exact[: len(part)]).square().mean().sqrt()
        assert error < 2e-2 * exact.square().mean().sqrt()


# --- whole models ------------------------------------------------------------------------------


def wide_config(place: Place) -> Any:
    """Four decoder layers, two of cross attention, as wide as the published ones on a GPU."""
    config = layout("tiny")
    text: Any = config.text_config
    if place.is_cuda:
        text.hidden_size, text.intermediate_size = 4096, 14_336
        text.num_attention_heads, text.num_key_value_heads = 32, 8
    text.num_hidden_layers, text.cross_attention_layers = 4, [1, 3]
    return config


def wide_model(place: Place, is_reference: bool, method: str | None = None) -> LoadedModel:
    """Random weights, the same for all; the reference: transformers' layers in float32."""
    dtype = torch.float32 if is_reference else place.dtype
    opened = random_checkpoint(wide_config(place), dtype)
    placement = on_one_device(opened.meta_model, torch.device(place.device))
    return load(opened, placement, method, is_fused=not is_reference)


def triton_runner(model: LoadedModel, backend: TritonBackend | None = None) -> ModelRunner:
    """Attention and what lies between the products by the kernels, on a CPU too."""
    runner = ModelRunner(model, PLAN, backend or TritonBackend())
    text_model = model.model.model.language_model
    assert is_fused(text_model)
    runner._fused = FusedDecoder(text_model, TritonOperations())
    return runner


# The interpreter tries only decodes with plain weights in every run.
LONG = () if torch.cuda.is_available() else pytest.mark.slow
CHUNKS = [1, pytest.param(7, marks=LONG)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", [None, pytest.param("int8", marks=LONG)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_model_of_kernels_gives_the_logits_of_float32(
    place: Place, method: str | None, chunk: int
) -> None:
    """Decodes (chunks of one token) and prefills, text and images batched."""
    names = ("short", "one", "adjacent", "apart") if place.is_cuda else ("short", "late")
    expected = prefill_logits(
        ModelRunner(wide_model(place, is_reference=True, method=method), PLAN), requests(*names), 7
    )
    runner = triton_runner(wide_model(place, is_reference=False, method=method))
    told = prefill_logits(runner, requests(*names), chunk)
    # int8: scales, and so codes, are rounded in another dtype
    share = 1e-3 if place.dtype == torch.float32 else 3e-2 if method is None else 8e-2
    for name, exact in expected.items():
        error = (told[name] - exact).square().mean().sqrt()
        assert error < share * exact.square().mean().sqrt(), name


@pytest.mark.parametrize("place", [SLOW_CPU, *GPU])
def test_replayed_steps_give_the_logits_of_eager_ones(place: Place, monkeypatch) -> None:
    """Steps of one and of two rows, one of which sees an image; on a CPU a tape is replayed."""
    if place.is_cuda:
        recorder: Recorder = CudaRecorder(torch.device("cuda", 0))
        backend = TritonBackend()
    else:
        recorder = TapeRecorder()
        tape_operations(recorder, monkeypatch)
        backend = taped_backend(recorder, 1)
    model = wide_model(place, is_reference=False)

    def told(replays: bool) -> dict[str, torch.Tensor]:
        runner = triton_runner(model, backend)
        if replays:
            runner.record_graphs(2, recorder)
        running = [prompt("short", "a"), prompt("see", "|ab", [image(1, 1)])]
        logits = prefill_logits(runner, running, 1)
        # the first step encodes the image
        assert runner.num_replays == (2 if replays else 0)
        return logits

    eager, replayed = told(False), told(True)
    # keys are split otherwise: sums are rounded in another order
    share = 1e-4 if place.dtype == torch.float32 else 2e-2
    for name, exact in eager.items():
        error = (replayed[name] - exact).square().mean().sqrt()
        assert error < share * exact.square().mean().sqrt(), name


def backend_of(place: Place) -> AttentionBackend:
    return get_backend("triton" if place.is_cuda else "sdpa")


ANYWHERE = [
    pytest.param(Place("cpu", torch.float32), id="cpu"),
    pytest.param(Place("cuda", torch.float32), id="cuda", marks=ON_GPU),
]


def asked() -> list[Request]:
    """Prompts of the bundled model's shape, with and without images."""
    return [
        prompt("words", "what is this, and why?"),
        prompt("one", "|what is in it?", [image(2, 1, tile_size=56)]),
        prompt("late", "count them: |", [image(6, 2, tile_size=56)]),
        prompt("two", "||which?", [image(1, 3, tile_size=56), image(6, 4, tile_size=56)]),
    ]


def largest_gap(model: LoadedModel, request: Request, generated: list[int]) -> float:
    """How far the tokens are, at most, below the best by this model, along themselves."""
    whole = replace(request, token_ids=[*request.token_ids, *generated])
    whole.text_blocks, whole.image_blocks, whole.num_computed_tokens = [], [], 0
    (logits,) = prefill_logits(ModelRunner(model, PLAN), [whole], 11).values()
    rows = logits[-len(generated) - 1 : -1].cpu()
    chosen = rows.gather(1, torch.tensor(generated)[:, None])[:, 0]
    return float((rows.max(-1).values - chosen).max())


def made(place: Place, folder: str | Path, **options: Any) -> ModelRunner:
    """By `create_runner`: the peak step, the pools, the backend's trial, and graphs on a GPU."""
    dtype = str(place.dtype).removeprefix("torch.")
    sizes = {"max_num_seqs": 8, "max_model_len": 256, "block_size": 16}
    return create_runner(
        str(folder), RunnerConfig(device=place.device, dtype=dtype, **(sizes | options))
    )


@pytest.mark.parametrize("place", ANYWHERE)
def test_the_bundled_model_answers_as_on_a_cpu_in_float32(place: Place) -> None:
    """Greedy, 24 tokens, all in one batch; a token may differ where two are as good as each other.

    As it is served on the device: with kernels and replayed steps on a GPU.
    """
    reference = load_model(CHECKPOINT, "cpu", "float32")
    runner = made(place, CHECKPOINT)
    told = asked()
    generate(runner, told, 24, chunk=6)
    assert runner.has_graphs == place.is_cuda
    assert (runner.num_replays > 0) == place.is_cuda
    for request, again in zip(told, asked(), strict=True):
        assert len(request.generated) == 24
        assert largest_gap(reference, again, request.generated) < 1e-3, request.request_id


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    "place", [ANYWHERE[0], pytest.param(Place("cuda", torch.bfloat16), id="cuda", marks=ON_GPU)]
)
def test_answers_do_not_depend_on_replay(place: Place, quantize: str | None) -> None:
    """In half precision on a GPU: each token is the best by either, or nearly."""
    runner = made(place, checkpoint("tiny"), quantize=quantize)
    assert runner.info.device.startswith(place.device)
    told = requests("text", "one", "late", "apart")
    generate(runner, told, 8, chunk=5)
    assert (runner.num_replays > 0) == place.is_cuda
    runner.forget_graphs()
    for request, again in zip(told, requests("text", "one", "late", "apart"), strict=True):
        whole = replace(again, token_ids=[*again.token_ids, *request.generated])
        (logits,) = prefill_logits(runner, [whole], 11).values()
        rows = logits[-9:-1]
        chosen = rows.gather(1, torch.tensor(request.generated, device=rows.device)[:, None])
        gap = float((rows.max(-1).values - chosen[:, 0]).max())
        assert gap <= (1e-4 if place.dtype == torch.float32 else 2e-2) * float(rows.std())


@pytest.mark.parametrize("place", ANYWHERE)
def test_an_image_in_parts_beside_decodes_is_that_of_one_pass(place: Place) -> None:
    model = load_model(checkpoint("tiny"), place.device, "float32")
    runner = ModelRunner(model, PLAN, backend_of(place))
    blocks = Blocks(PLAN.sizes)
    words, late = requests("text", "late")
    runner.compute_logits(schedule(words, len(words.token_ids), blocks))
    whole = schedule(late, len(late.token_ids), blocks)
    expected = runner.compute_logits(whole)
    (due,) = whole.images
    for begin, end in ((0, 1), (1, 3)):
        words.token_ids.append(5)
        beside = schedule(words, 1, blocks)
        part = ImageToEncode(due.image, due.block_ids, begin, end)
        runner.compute_logits(StepBatch(beside.sequences, [part]))
    last = ImageToEncode(due.image, due.block_ids, 3)
    poison_blocks(runner.pools, [], due.block_ids)
    told = runner.compute_logits(StepBatch(whole.sequences, [last]))
    torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4)


MIXTURE = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_p=0.9, top_k=40),
    SamplingParams(top_p=0.999),
    SamplingParams(top_k=3),
    SamplingParams(min_p=0.1, top_p=0.6),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((5, 2.0),)),
    SamplingParams(temperature=0.0, presence_penalty=1.0),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_the_same_logits_and_seeds_give_the_same_tokens_on_every_device(device: str) -> None:
    """Against a CPU with each row alone: a row's token depends on nothing beside it."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 20_000, generator=generator)
    params = [
        msgspec.structs.replace(MIXTURE[row % len(MIXTURE)], seed=row) for row in range(len(logits))
    ]
    contexts = [context_of([1, 2, 3], [4, 4, 5], [6]) for _ in params]
    indices = list(range(len(params)))
    alone = [
        int(sample(logits[row, None].clone(), [params[row]], [row], [contexts[row]]))
        for row in indices
    ]
    assert sample(logits.to(device), params, indices, contexts).tolist() == alone
