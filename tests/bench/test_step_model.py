"""The model of a step's time: its terms against the desk check's, and its statements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.oracle import GREEDY, runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextModel

from vlmserve.bench.step_model import (
    BEFORE,
    CARDS,
    FEED_LAUNCHES,
    LAYER_LAUNCHES,
    SAMPLING_LAUNCHES,
    STEP_LAUNCHES,
    STEPS,
    TODAY,
    aims,
    bound_ms,
    estimate_ms,
    main,
    terms,
)
from vlmserve.models.attention import triton_kernels
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.batch import SamplingParams, StepBatch
from vlmserve.models.decoder import fused_kernels, kernel_launch
from vlmserve.models.decoder.decoder import FusedDecoder, FusedSelfLayer, LayerCount
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.device_copies import fetch
from vlmserve.models.execution.graphs.decode import DecodeGraphs, GraphLimits
from vlmserve.models.execution.graphs.recorder import Computation, Recorder
from vlmserve.models.execution.warm_up import probe_sequence
from vlmserve.models.kv_cache.paged_cache import KVPools, LayerCache
from vlmserve.models.kv_cache.step_inputs import pack
from vlmserve.models.kv_cache.step_tensors import send
from vlmserve.models.sampling.sampler import sample

H100 = CARDS[0]
ROOT = Path(__file__).resolve().parents[2]


def total(code, name: str, card=H100, quantize: str | None = None) -> float:
    return sum(terms(card, code, STEPS[name], quantize).values())


def test_the_model_agrees_with_the_desk_check_of_33f2d30() -> None:
    """Its section C and findings B2, B4 and B11, on an H100; within 15 %, or within its range."""
    assert bound_ms(H100, STEPS["decode/1"]) == pytest.approx(5.0, rel=0.02)
    assert bound_ms(H100, STEPS["decode/64"]) == pytest.approx(5.7, rel=0.02)
    assert total(BEFORE, "decode/1") == pytest.approx(6.9, rel=0.15)
    assert total(BEFORE, "decode/64") == pytest.approx(9.2, rel=0.15)
    assert 8 + 16 < total(BEFORE, "decode/32/long") < 8 + 32
    top_p = total(BEFORE, "decode/64/top-p") - total(BEFORE, "decode/64")
    assert 1.0 <= top_p <= 2.0
    unpacking = total(BEFORE, "decode/64/chunk", quantize="int8")
    assert 10 < unpacking - total(BEFORE, "decode/64", quantize="int8") < 20


def test_no_step_takes_longer_than_before_and_none_is_below_its_bound() -> None:
    for card in CARDS:
        for name, step in STEPS.items():
            assert bound_ms(card, step) < total(TODAY, name, card), (card.name, name)
            assert total(TODAY, name, card) <= total(BEFORE, name, card) + 0.1
            assert all(value >= 0 for value in terms(card, TODAY, step).values())


def test_a_long_row_and_a_chunk_cost_little_more_than_their_bytes() -> None:
    assert total(TODAY, "decode/32/long") < 1.5 * bound_ms(H100, STEPS["decode/32/long"])
    (_, share, _), (_, times, _) = aims()
    assert 0.75 < share < 1.0
    assert times < 1.3


def test_rows_of_known_cards_get_an_estimate() -> None:
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "decode/1") == pytest.approx(
        total(TODAY, "decode/1"), abs=0.01
    )
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "encode") == H100.encode_ms[1]
    assert estimate_ms("NVIDIA H100 80GB HBM3", "none", "prefill/1") is None
    assert estimate_ms("NVIDIA T4", "none", "decode/1") is None


def test_the_documented_estimates_are_those_of_the_model(capsys) -> None:
    main()
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "gpu-benchmark.md").read_text("utf-8")
    for name, step in STEPS.items():
        figures = (bound_ms(H100, step), total(BEFORE, name), total(TODAY, name))
        row = f"| `{name}` | " + " | ".join(f"{one:.1f}" for one in figures) + " |"
        assert row in page, row
        assert name in printed
    for aim, value, is_met in aims():
        assert f"{aim}: {value:.2f}, {'met' if is_met else 'not met'}" in printed


class Launches(TorchDispatchMode):
    """Counts what would be launched: kernels by name, and torch's operations but for views."""

    VIEWS = frozenset(
        f"aten::{name}"
        for name in (
            "empty",
            "empty_like",
            "view",
            "reshape",
            "unsqueeze",
            "select",
            "slice",
            "detach",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name
        is_moved = name != "aten::to" or result.dtype != args[0].dtype
        if name not in self.VIEWS and is_moved:
            self.counts[name] += 1
        return result

    def kernels(self, module: Any) -> SimpleNamespace:
        """The kernels of a module, counted instead of launched."""
        names = [name for name in vars(module) if name.endswith("_kernel")]
        return SimpleNamespace(**{name: _Counted(self.counts, name) for name in names})


class _Counted:
    def __init__(self, counts: Counter[str], name: str) -> None:
        self._counts, self._name = counts, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self._counts.update([self._name])


def launches_of(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of a recorded step of one row of text, of a model of the published widths without memory."""
    config = MllamaTextConfig(num_hidden_layers=num_layers, cross_attention_layers=[])
    with torch.device("meta"):
        model: Any = MllamaTextModel(config).to(torch.bfloat16)
    model.rotary_emb.float()  # as it is loaded
    model.layers = nn.ModuleList(FusedSelfLayer(layer) for layer in model.layers)
    cache = torch.empty(64, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    pools = KVPools([LayerCache(cache, cache)] * num_layers, frozenset(), 1601)
    launches, backend = Launches(), TritonBackend()
    monkeypatch.setattr(kernel_launch, "fused_kernels", launches.kernels(fused_kernels))
    backend._kernels = launches.kernels(triton_kernels)  # type: ignore[assignment]

    class Counting(Recorder):
        def record(self, compute: Computation) -> Computation:
            with launches:
                compute()
            return compute

    decoder = FusedDecoder(model, TritonOperations())
    with torch.inference_mode():
        DecodeGraphs(
            decoder, pools, backend, GraphLimits(1, 8192, 16, 4), Counting(), LayerCount(model)
        )
    return launches.counts


def test_a_recorded_pass_launches_what_the_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model counted seven small kernels a layer, two of which the code never launched."""
    two, three = (launches_of(number, monkeypatch) for number in (2, 3))
    assert dict(three - two) == LAYER_LAUNCHES
    assert dict(two - Counter(LAYER_LAUNCHES) - Counter(LAYER_LAUNCHES)) == STEP_LAUNCHES


def test_a_greedy_step_launches_what_the_model_counts_after_its_pass() -> None:
    launches = Launches()
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    with torch.inference_mode(), launches:
        sampled = sample(logits.float(), [SamplingParams(temperature=0.0)], [0])
        copied = sampled.token_ids, launches.counts.copy()
        fetch([copied[0]])
    assert dict(copied[1]) == SAMPLING_LAUNCHES
    # on a CPU the copy down is none, and nothing is joined before it
    assert set(launches.counts - copied[1]) <= {"aten::resolve_conj", "aten::resolve_neg"}


def test_a_chunk_that_is_started_ahead_launches_little_more_than_when_it_is_not() -> None:
    """Only what reads the tokens of the decodes beside it, which are still on the device."""
    model = runner("tiny")
    rows = [
        probe_sequence("row", 1, 9, 4, (), GREEDY),
        probe_sequence("chunk", 6, 6, 4, (), GREEDY),
    ]
    inputs = pack(StepBatch(rows), 4, 5)
    sampled, cpu = torch.tensor([7, 0]), torch.device("cpu")
    with torch.inference_mode():
        with (plain := Launches()):
            sent = send(inputs, None, model._backend, cpu, torch.float32)
            expected = model._by_fused(sent)
        with (ahead := Launches()):
            started = model._start(inputs, sampled, [1])
    assert dict(ahead.counts - plain.counts) == FEED_LAUNCHES
    assert torch.equal(started.states, expected.states)
