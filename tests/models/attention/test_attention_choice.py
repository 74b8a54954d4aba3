"""Which attention backend a run gets, why, and that one which computes wrongly gets no run."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from support.attention_cases import cpu_backend
from support.fake_kernels import FLASH_ATTN, varlen_attn_of
from support.oracle import checkpoint

from vlmserve.models.attention import Geometry, backend_names, get_backend, triton_paged
from vlmserve.models.attention.choice import choose_backend
from vlmserve.models.attention.flash_attn_package import FlashAttnBackend, FlashAttnKernels
from vlmserve.models.attention.torch_varlen import VarlenBackend
from vlmserve.models.attention.trial import what_is_wrong
from vlmserve.models.attention.triton_paged import TritonBackend, keys_at_once
from vlmserve.models.create_runner import create_runner
from vlmserve.models.errors import ModelError
from vlmserve.models.kernels import c_library, paged_attention
from vlmserve.models.settings.runner_config import RunnerConfig

LOGGER = "vlmserve.models.attention.choice"
CPU = Geometry(torch.device("cpu"), torch.bfloat16, 6, 2, 16, 5)
FAKES = {
    "sdpa": lambda: get_backend("sdpa"),
    "flash_attn": lambda: FlashAttnBackend(FLASH_ATTN),
    "triton": TritonBackend,
    "varlen": lambda: VarlenBackend(varlen_attn_of("FA2"), "FA2"),
}


def cuda(**changes) -> Geometry:
    """A geometry that is only asked about: no GPU is needed to be told why not."""
    facts = {"dtype": torch.bfloat16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    facts |= {"num_patches": 1601, "device": torch.device("cuda", 0), **changes}
    return Geometry(**facts)


@pytest.fixture
def everything_works(monkeypatch):
    """Backends that find nothing amiss with this machine; their kernels are stand-ins."""
    for name in ("flash_attn", "triton", "varlen"):
        monkeypatch.setattr(type(FAKES[name]()), "why_not", classmethod(lambda *_: None))


def test_an_unknown_backend_is_refused_by_name() -> None:
    names = ", ".join(repr(name) for name in backend_names())
    for ask in (get_backend, lambda name: choose_backend(name, CPU)):
        with pytest.raises(ModelError, match=f"'paper' is unknown: use one of \\[{names}\\]"):
            ask("paper")


def test_a_cpu_gets_sdpa_and_the_log_says_why_not_the_others(caplog) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    choice = choose_backend("auto", CPU)
    assert (choice.backend.name, choice.block_size) == ("sdpa", 16)
    assert [record.getMessage() for record in caplog.records] == [
        "attention by sdpa, blocks of 16 tokens (not flash_attn: it needs a CUDA device, and this "
        "is cpu; not triton: it needs a CUDA device, and this is cpu; not varlen: it needs a CUDA "
        "device, and this is cpu; not cpu: a hidden size of 96 is below 512)"
    ]


def test_a_large_model_on_a_cpu_reads_decodes_in_place(caplog) -> None:
    cpu_backend()
    large = replace(CPU, num_heads=8, head_dim=64)
    assert choose_backend("auto", large).backend.name == "cpu"
    caplog.set_level(logging.INFO, logger=LOGGER)
    with c_library.allowed(False):
        assert choose_backend("auto", large).backend.name == "sdpa"
    assert "not cpu: --cpu-products is torch" in caplog.text


def test_without_a_compiler_a_large_model_keeps_sdpa(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    monkeypatch.setattr(paged_attention, "_library", lambda: None)
    assert choose_backend("auto", replace(CPU, num_heads=8, head_dim=64)).backend.name == "sdpa"
    assert "not cpu: it needs gcc" in caplog.text


def test_a_backend_that_cannot_be_had_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ModelError,
        match="'flash_attn' cannot be used: it needs a CUDA device, and this is cpu; "
        "use --attention-backend auto",
    ):
        choose_backend("flash_attn", CPU)


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({"dtype": torch.float32}, (9, 0), "bfloat16 and float16, not float32"),
        ({"head_dim": 20}, (9, 0), "head_dim 20 is not a multiple of 8"),
        ({"head_dim": 320}, (9, 0), "head_dim 320 is not a multiple of 8 up to 256"),
        ({}, (7, 5), "compute capability 7.5 is below 8.0"),
        ({}, (9, 0), "the package flash-attn is not installed .*vlmserve\\[flash\\]"),
    ],
)
def test_what_the_kernels_refuse_is_told_before_they_are_called(
    changes, capability, reason, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    with pytest.raises(ModelError, match=reason):
        choose_backend("flash_attn", cuda(**changes))


def test_a_torch_without_block_tables_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        "vlmserve.models.attention.torch_varlen._import_function", lambda: lambda query, key: None
    )
    with pytest.raises(ModelError, match=r"has no varlen_attn with block_table: it needs 2\.13"):
        choose_backend("varlen", cuda())


def test_auto_takes_the_fastest_that_works_with_blocks_that_it_reads(everything_works) -> None:
    choice = choose_backend("auto", CPU, get=lambda name: FAKES[name]())
    assert (choice.backend.name, choice.block_size) == ("flash_attn", 256)
    choice = choose_backend("varlen", CPU, 512, get=lambda name: FAKES[name]())
    assert (choice.backend.name, choice.block_size) == ("varlen", 512)


def test_auto_takes_the_backend_that_graphs_need_where_steps_can_be_recorded(
    everything_works,
) -> None:
    """An installed flash-attn turned graphs off, which limits small steps by the host."""
    choice = choose_backend("auto", CPU, get=lambda name: FAKES[name](), with_graphs=True)
    assert (choice.backend.name, choice.block_size) == ("triton", 16)
    choice = choose_backend("flash_attn", CPU, get=lambda name: FAKES[name](), with_graphs=True)
    assert choice.backend.name == "flash_attn"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_float32_with_wide_heads_is_left_to_sdpa(capability, monkeypatch, caplog) -> None:
    """Its operands do not fit the registers: kernels that spill are slower by far."""
    caplog.set_level(logging.INFO, logger=LOGGER)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = TritonBackend.why_not(cuda(dtype=torch.float32))
    assert reason == "float32 heads of 128 are over 64"
    assert TritonBackend.why_not(cuda(dtype=torch.float32, head_dim=64)) is None
    assert TritonBackend.why_not(cuda()) is None


@pytest.mark.parametrize(
    ("capability", "num_query_rows", "expected"),
    [((8, 0), 16, 64), ((8, 6), 16, 32), ((8, 9), 16, 32), ((8, 6), 64, 64), ((9, 0), 16, 64)],
)
def test_small_chips_load_fewer_keys_at_a_time(
    capability, num_query_rows, expected, monkeypatch
) -> None:
    monkeypatch.setattr(triton_paged, "capability_of", lambda device: capability)
    assert keys_at_once(torch.device("cuda", 0), num_query_rows) == expected


def test_a_block_size_that_was_asked_for_stands(everything_works, caplog) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    choice = choose_backend("auto", CPU, 32, get=lambda name: FAKES[name]())
    assert (choice.backend.name, choice.block_size) == ("triton", 32)
    assert "flash_attn: --block-size 32 is not a multiple of 256" in caplog.text
    with pytest.raises(ModelError, match="--block-size 32 is not a multiple of 256"):
        choose_backend("varlen", CPU, 32, get=lambda name: FAKES[name]())


@pytest.mark.parametrize(
    "name", ["flash_attn", pytest.param("triton", marks=pytest.mark.slow), "varlen"]
)
@pytest.mark.parametrize("num_heads", [2, 6])
def test_a_trial_finds_nothing_wrong_with_kernels_that_compute_rightly(name, num_heads) -> None:
    geometry = Geometry(CPU.device, CPU.dtype, num_heads, 2, 16, 5)
    assert what_is_wrong(FAKES[name](), geometry, 256) is None


def wrong_kernels(kind: str) -> FlashAttnKernels:
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    def double(*args, **kwargs):
        return FLASH_ATTN.with_kvcache(*args, **kwargs) * 2

    def not_a_number(*args, **kwargs):
        return FLASH_ATTN.with_kvcache(*args, **kwargs) * float("nan")

    def without_lse(*args, return_attn_probs=False, **kwargs):
        result = FLASH_ATTN.varlen(*args, return_attn_probs=return_attn_probs, **kwargs)
        return (result[0], result[1] * 0, None) if return_attn_probs else result

    return {
        "raises": FlashAttnKernels(FLASH_ATTN.varlen, fail),
        "is off": FlashAttnKernels(FLASH_ATTN.varlen, double),
        "is NaN": FlashAttnKernels(FLASH_ATTN.varlen, not_a_number),
        "loses the log-sum-exp": FlashAttnKernels(without_lse, FLASH_ATTN.with_kvcache),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", "failed: RuntimeError: no kernel image is available for execution"),
        ("is off", "was off by"),
        ("is NaN", "was off by nan"),
        ("loses the log-sum-exp", "was off by"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_passed_over(kind, said, everything_works, caplog) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    fakes = FAKES | {"flash_attn": lambda: FlashAttnBackend(wrong_kernels(kind))}
    choice = choose_backend("auto", CPU, get=lambda name: fakes[name]())
    assert choice.backend.name == "triton"
    assert f"not flash_attn: the trial {said}" in caplog.text
    with pytest.raises(ModelError, match=f"'flash_attn' cannot be used: the trial {said}"):
        choose_backend("flash_attn", CPU, get=lambda name: fakes[name]())


def test_a_runner_is_made_with_the_chosen_blocks_or_not_at_all() -> None:
    runner = create_runner(checkpoint("tiny"), RunnerConfig(block_size=32, max_num_seqs=1))
    assert runner.info.pools.block_size == 32
    assert (
        create_runner(checkpoint("tiny"), RunnerConfig(max_num_seqs=1)).info.pools.block_size == 16
    )
    with pytest.raises(ModelError, match="'varlen' cannot be used"):
        create_runner(checkpoint("tiny"), RunnerConfig(attention_backend="varlen"))
