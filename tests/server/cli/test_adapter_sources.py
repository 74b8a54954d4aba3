"""`--lora` and its neighbours: what they take, and the one line for what they do not."""

from __future__ import annotations

import json

import pytest

from vlmserve.models.lora.files import CONFIG, WEIGHTS, digest_of
from vlmserve.server.adapters.settings import AdapterSettings
from vlmserve.server.cli import adapter_sources
from vlmserve.server.cli.adapter_sources import find_adapters
from vlmserve.server.cli.environment import adopt
from vlmserve.server.cli.model_source import ModelFilesError
from vlmserve.server.cli.startup_checks import check_adapters


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "french-v2"
    path.mkdir()
    (path / CONFIG).write_text("{}")
    (path / WEIGHTS).write_text("w")
    return path


def test_a_folder_and_vllms_form_are_taken(folder):
    text = json.dumps({"name": "b", "path": str(folder), "base_model_name": "any"})
    found = find_adapters([f"a={folder}", text], ["model"], None)
    assert [one.name for one in found] == ["a", "b"]
    for one in found:
        assert (one.root, one.origin) == ("french-v2", "start")
        assert one.ref.folder == str(folder)
        assert one.ref.digest == digest_of(folder)


def test_a_hub_id_is_downloaded_and_shown(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        adapter_sources, "_download", lambda hub_id, cache: asked.append((hub_id, cache)) or folder
    )
    (one,) = find_adapters(["a=org/name"], ["model"], "/cache")
    assert asked == [("org/name", "/cache")]
    assert one.root == "org/name"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("french", "NAME=FOLDER"),
        ("french=", "NAME=FOLDER"),
        ("=x", "1 to 128"),
        ("a b=x", "1 to 128"),
        ("{", "--lora"),
        ('{"name": "a"}', "path"),
        ("a=./nothing", CONFIG),
        ("a=a/b/c", CONFIG),
        ("model={folder}", "given twice"),
    ],
)
def test_other_values_are_one_line(folder, value, reason):
    with pytest.raises(ModelFilesError) as refused:
        find_adapters([value.replace("{folder}", str(folder))], ["model"], None)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_is_given_once(folder):
    with pytest.raises(ModelFilesError, match="given twice"):
        find_adapters([f"a={folder}"] * 2, ["model"], None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora_source": "/nowhere"}, "--lora-source /nowhere"),
        ({"lora_root": "/nowhere"}, "--lora-root /nowhere"),
        ({"allow_lora_updates": True}, "--lora-root FOLDER"),
    ],
)
def test_folders_are_checked_at_the_start(fields, reason):
    with pytest.raises(ValueError, match=reason):
        check_adapters(AdapterSettings(**fields))


def test_requests_load_from_the_watched_folder_unless_another_is_named(tmp_path):
    watched = AdapterSettings(allow_lora_updates=True, lora_source=str(tmp_path))
    check_adapters(watched)
    assert watched.updates_root == str(tmp_path)
    assert AdapterSettings(lora_source="/a", lora_root="/b").updates_root == "/b"


def test_the_documented_services_variables_set_the_options():
    environ = {"NIM_PEFT_SOURCE": "/a", "NIM_PEFT_REFRESH_INTERVAL": "7", "NIM_MAX_GPU_LORAS": "3"}
    adopt(environ)
    assert environ["VLMSERVE_LORA_SOURCE"] == "/a"
    assert environ["VLMSERVE_LORA_REFRESH"] == "7"
    assert environ["VLMSERVE_MAX_LORAS"] == "3"
