"""Which device and dtype a model computes in; GPUs are stand-ins."""

from __future__ import annotations

import logging

import pytest
import torch

from vlmserve.models.errors import ModelError
from vlmserve.models.weights import device_choice
from vlmserve.models.weights.device_choice import choose_device, choose_dtype


def test_an_unknown_device_or_dtype_is_refused_by_name() -> None:
    for name in ("tpu", "mps", "cuda:x", ""):
        with pytest.raises(ModelError, match=f"device {name!r} is unknown"):
            choose_device(name)
    with pytest.raises(ModelError, match="'cuda:99' does not exist"):
        choose_device("cuda:99")
    with pytest.raises(ModelError, match="dtype 'int8' is unknown"):
        choose_dtype("int8", torch.device("cpu"))


def test_auto_dtype_is_bfloat16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda h=has_it: h, raising=False
        )
        assert choose_dtype("auto", cpu) is dtype
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert choose_dtype("auto", cpu) is torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 6), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((10, 0), torch.bfloat16),
    ],
)
def test_auto_dtype_is_the_half_type_of_the_gpu(monkeypatch, capability, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda", 0)) is dtype


@pytest.fixture
def unusable_gpu(monkeypatch, tmp_path):
    """A machine with a GPU that torch cannot use."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device_choice, "GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_with_too_old_a_driver_is_an_error_with_the_drivers_reason(
    unusable_gpu, monkeypatch
) -> None:
    """It served on the CPU in silence."""

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(ModelError, match=r"torch for CUDA 13\.0 .*too old .*or use --device cpu"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"


def test_a_torch_for_cpus_beside_a_gpu_serves_and_logs_it(
    unusable_gpu, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto").type == "cpu"
    assert "this torch is a build for CPUs" in caplog.text


def test_a_machine_without_a_gpu_serves_on_the_cpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(device_choice, "GPU_FILE", tmp_path / "missing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
