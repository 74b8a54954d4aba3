"""`vlmserve check`: what a checkpoint is, and where it fits, without torch in its own process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.coded_checkpoints import FORMS, set_config, write

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.memory.estimate import part_bytes
from vlmserve.models.weights.device_map import parts_of
from vlmserve.models.weights.loader import open_checkpoint


def check(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmserve.server", "check", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_bundled_model_fits_everywhere_by_the_loaders_own_arithmetic() -> None:
    done = check("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["stored"] == "plain weights (BF16)"
    assert report["template"] == "chat_template.jinja"
    assert report["grammars"] is None
    assert report["content_format"] == "both"
    names = [None, "int8", "fp8", "bitsandbytes", "bitsandbytes-nf4", "int4"]
    assert [row["quantize"] for row in report["rows"]] == names
    opened = open_checkpoint(CHECKPOINT, torch.bfloat16)
    parts = part_bytes(parts_of(opened.meta_model), opened.tensors, torch.bfloat16)
    assert report["rows"][0]["weights"] == sum(parts.values())
    assert [gpu["gb"] for gpu in report["rows"][0]["gpus"]] == [24, 40, 48, 80, 141]
    # 3 layers, 4 tiles of 17 patches, keys and values of 2 heads of 32
    num_heads = 3 * 4 * 17 * 2 * 2
    assert report["image_bytes"] == {"auto": num_heads * 64, "int8": num_heads * 34}
    assert all(gpu["context"] == report["context"] for gpu in report["rows"][0]["gpus"])
    weights = [row["weights"] for row in report["rows"]]
    assert weights[0] > weights[1] == weights[2] == weights[3] > weights[4] > weights[5]


@pytest.mark.slow
def test_a_quantized_checkpoint_has_one_row_and_its_form_in_words(tmp_path: Path) -> None:
    coded, _ = write(CHECKPOINT, FORMS["fp8-channel"], tmp_path)
    tokenizer = json.loads((coded / "tokenizer.json").read_text())
    (coded / "tokenizer.json").write_text(json.dumps(tokenizer | {"decoder": None}))
    done = check(str(coded))
    assert done.returncode == 0, done.stderr
    assert "compressed-tensors (" in done.stdout
    assert "layers in fp8)" in done.stdout
    assert "\nint8" not in done.stdout
    assert "template  chat_template.jinja, contents as strings or lists of parts" in done.stdout
    assert "grammars  none: the tokenizer does not support grammars" in done.stdout


@pytest.mark.slow
def test_a_stale_key_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "stale")
    set_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    report = json.loads(check(str(folder), "--json").stdout)
    assert report["stored"] == "plain weights (BF16); quantization_config (bitsandbytes) is ignored"


def test_a_folder_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = check(str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("vlmserve: ")
    assert "is served" in line
