"""A step that fails for good is told from one that fails alone."""

from __future__ import annotations

import pytest
import torch
from support.oracle import runner

from vlmserve.models.batch import DeviceLostError, StepBatch
from vlmserve.models.errors import StepError
from vlmserve.models.execution import device_health
from vlmserve.models.execution.device_health import is_lost


def test_a_device_is_lost_when_even_waiting_for_it_fails(monkeypatch):
    def fail(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert is_lost(torch.device("cuda", 1))
    assert not is_lost(torch.device("cpu"))


@pytest.mark.parametrize(("lost", "error"), [(False, StepError), (True, DeviceLostError)])
def test_a_failed_step_tells_whether_others_can_be_computed(monkeypatch, lost, error):
    monkeypatch.setattr(device_health, "is_lost", lambda device: lost)
    with pytest.raises(error) as failure:
        runner("tiny").execute(StepBatch())
    if lost:
        assert str(failure.value) == "cpu cannot compute any more"
        assert isinstance(failure.value.__cause__, StepError)
