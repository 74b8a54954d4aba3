"""An adapter's two files: their digest, and what its configuration may have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmserve.models.errors import AdapterError
from vlmserve.models.lora.config import read_config
from vlmserve.models.lora.files import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, digest_of, read_files

LAYER = "model.language_model.layers.3.self_attn.q_proj"


def config(**settings):
    return read_config(json.dumps({"peft_type": "LORA", "r": 8, **settings}).encode())


def folder_of(path: Path, settings: bytes = b"{}", weights: bytes = b"weights") -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_bytes(settings)
    (path / WEIGHTS).write_bytes(weights)
    return path


# --- files ----------------------------------------------------------------------------------------


def test_a_digest_depends_on_both_files_and_on_nothing_else(tmp_path):
    first = digest_of(folder_of(tmp_path / "a"))
    assert first == digest_of(folder_of(tmp_path / "b"))
    others = [
        folder_of(tmp_path / "c", settings=b"{ }"),
        folder_of(tmp_path / "d", weights=b"other"),
        folder_of(tmp_path / "e", settings=b"{}w", weights=b"eights"),
    ]
    assert len({first, *map(digest_of, others)}) == 4


def test_files_that_changed_after_their_digest_are_not_read(tmp_path):
    folder = folder_of(tmp_path)
    digest = digest_of(folder)
    assert read_files(folder, digest, 100) == (b"{}", b"weights")
    (folder / WEIGHTS).write_bytes(b"weights!")
    with pytest.raises(AdapterError, match="changed after"):
        read_files(folder, digest, 100)


def test_a_file_larger_than_any_adapter_is_not_read(tmp_path):
    folder = folder_of(tmp_path, weights=b"x" * 101)
    with pytest.raises(AdapterError, match=r"has 101 bytes.*--max-lora-rank.*\(100\)"):
        read_files(folder, digest_of(folder), 100)


def test_what_is_no_adapter_is_named(tmp_path):
    with pytest.raises(AdapterError, match="adapter_config\\.json is missing"):
        digest_of(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"{}")
    with pytest.raises(AdapterError, match="adapter_model\\.safetensors is missing"):
        digest_of(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle"):
        digest_of(tmp_path)
    (tmp_path / CONFIG).write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterError, match="has over"):
        digest_of(tmp_path)


# --- configuration --------------------------------------------------------------------------------


def test_a_scale_is_alpha_over_the_rank_or_over_its_root():
    assert config(lora_alpha=16).scale_of(LAYER) == 2
    assert config(r=16, lora_alpha=8, use_rslora=True).scale_of(LAYER) == 2
    assert config(rank_pattern=None, alpha_pattern=None).scale_of(LAYER) == 1


def test_patterns_match_the_end_of_a_name_and_the_first_counts():
    found = config(
        lora_alpha=8,
        rank_pattern={"v_proj": 2, r"layers\.[0-3]\.self_attn\.q_proj": 4, "q_proj": 16},
        alpha_pattern={"proj": 100, "^model.*q_proj": 2},
    )
    assert found.rank_of(LAYER) == 4
    assert found.rank_of(LAYER.replace("3", "4")) == 16
    assert found.rank_of(LAYER.replace("q_proj", "o_proj")) == 8
    # a pattern stands for whole parts of the name
    assert found.scale_of(LAYER) == 2 / 4


def test_ranks_and_scales_of_patterns_go_together():
    found = config(rank_pattern={"q_proj": 4}, use_rslora=True, lora_alpha=6)
    assert found.scale_of(LAYER) == 3


def test_a_pattern_that_takes_forever_is_refused(monkeypatch):
    monkeypatch.setattr("vlmserve.models.lora.config._MATCH_SECONDS", 0.05)
    found = config(rank_pattern={"(.*?)" * 10 + "[xz]": 4})
    with pytest.raises(AdapterError, match="did not match in"):
        found.rank_of(2 * LAYER)


def test_a_pattern_that_is_no_expression_is_refused():
    with pytest.raises(AdapterError, match="is invalid"):
        config(rank_pattern={"q_proj(": 4}).rank_of(LAYER)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not served"),
        ({"peft_type": None}, "peft_type None is not served"),
        ({"use_dora": True}, "DoRA is not served.*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA is not served"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "repeated layers"),
        ({"bias": "all"}, "bias all is not served"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head, embed_tokens.*whole layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base model"),
        ({"r": 0}, r"\$\.r"),
        ({"r": "8"}, r"\$\.r"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"target_modules": 7}, "target_modules"),
    ],
)
def test_what_is_not_served_is_named(settings, reason):
    with pytest.raises(AdapterError, match=reason) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"peft_type": "LORA"}'])
def test_a_configuration_that_is_unreadable_is_an_error_of_one_line(content):
    with pytest.raises(AdapterError, match=CONFIG) as caught:
        read_config(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": [], "bias": "none"},
        {"target_modules": "all-linear", "modules_to_save": None, "use_dora": False},
        {"target_modules": r"(?:.*?(?:vision|language).*?(?:q_proj|fc1))", "loftq_config": {}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "a_newer_setting": None},
    ],
)
def test_settings_as_peft_and_unsloth_write_them_are_read(settings):
    assert config(base_model_name_or_path="unsloth/base", **settings).base_model_name_or_path
