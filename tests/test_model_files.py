"""Hub ids and folders: what is refused before anything is loaded, in one line with the remedy."""

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from vlmserve.server.model_files import ModelFilesError, resolve_model

RESPONSE = httpx2.Response(403, request=httpx2.Request("GET", "http://127.0.0.1/"))
FAULTS = {
    "gated": (errors.GatedRepoError("x", response=RESPONSE), "accept its licence .* set HF_TOKEN"),
    "missing": (errors.RepositoryNotFoundError("x", response=RESPONSE), "the hub has no model"),
    "revision": (errors.RevisionNotFoundError("x", response=RESPONSE), "has no revision 'v9'"),
    "unreachable": (errors.LocalEntryNotFoundError("no route\nmore"), "cannot reach the hub"),
    "offline": (errors.OfflineModeIsEnabled("offline mode"), "cannot reach the hub"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(fault, monkeypatch):
    error, message = FAULTS[fault]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelFilesError, match=message) as raised:
        resolve_model("some-owner/some-model", "v9")
    assert "some-owner/some-model" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_what_serving_reads_is_downloaded(tmp_path, monkeypatch):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some-owner/some-model", "v9").path == tmp_path
    assert asked["revision"] == "v9"
    assert not [p for p in asked["allow_patterns"] if p.endswith((".bin", ".pt", ".pth", ".py"))]


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ModelFilesError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
