"""Hub ids and folders: what is refused before anything is loaded, in one line with the remedy."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.cli.model_source import ModelFilesError, resolve_model

HUB_ID = "some-owner/some-model"


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1/"))


RESPONSE = response(403)
FAULTS = {
    "gated": (errors.GatedRepoError("x", response=RESPONSE), "accept its licence .* set HF_TOKEN"),
    "missing": (errors.RepositoryNotFoundError("x", response=RESPONSE), "the hub has no model"),
    "revision": (errors.RevisionNotFoundError("x", response=RESPONSE), "has no revision 'v9'"),
    "unreachable": (errors.LocalEntryNotFoundError("no route\nmore"), "cannot reach the hub"),
    "offline": (errors.OfflineModeIsEnabled("offline mode"), "cannot reach the hub"),
    "no connection": (httpx2.ConnectError("refused"), "cannot reach the hub .* refused"),
    "silence": (httpx2.ReadTimeout(""), "cannot reach the hub .* ReadTimeout"),
    "no config": (
        errors.RemoteEntryNotFoundError("x", response=response(404)),
        r"has no config\.json: it is not a model",
    ),
    "a wrong token": (
        errors.HfHubHTTPError("x", response=response(401)),
        "the hub rejects the token in HF_TOKEN",
    ),
    "a hub that fails": (
        errors.HfHubHTTPError("down\nmore", response=response(503)),
        "the hub answers 503 .*: down",
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left"), "no room on disk .* set HF_HOME"),
    "a cache of somebody else": (
        PermissionError(13, "denied", "/x"),
        "cannot be written .* HF_HOME",
    ),
    "a name that is none": (errors.HFValidationError("bad name"), "is not a hub id: bad name"),
}


def config_file(folder, **changes):
    config = json.loads((CHECKPOINT / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the bundled model; what was asked of it."""
    asked = []
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)

    def download(hub_id, name, **options):
        asked.append(("file", hub_id, name, options))
        return config_file(tmp_path)

    def snapshot(hub_id, **options):
        asked.append(("snapshot", hub_id, None, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def refusal(*arguments):
    with pytest.raises(ModelFilesError) as raised:
        resolve_model(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("step", ["hf_hub_download", "snapshot_download"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(fault, step, hub, monkeypatch):
    error, message = FAULTS[fault]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, step, fail)
    with pytest.raises(ModelFilesError, match=message) as raised:
        resolve_model(HUB_ID, "v9")
    assert HUB_ID in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_what_serving_reads_is_downloaded(hub, tmp_path):
    assert resolve_model(HUB_ID, "v9", "/cache").path == tmp_path
    (_, _, name, first), (_, _, _, second) = hub
    assert name == "config.json"
    assert first["revision"] == second["revision"] == "v9"
    assert first["cache_dir"] == second["cache_dir"] == "/cache"
    patterns = second["allow_patterns"]
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", ".py"))]


def test_another_architecture_is_refused_before_its_weights_are_downloaded(
    hub, tmp_path, monkeypatch
):
    file = config_file(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: file)
    line = refusal(HUB_ID)
    assert line.startswith(f"{HUB_ID}: the checkpoint is a LlamaForCausalLM; only Mllama")
    assert hub == []


def test_pickle_weights_on_the_hub_are_refused(hub, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    assert f"{HUB_ID} has no weights in safetensors; pickle weights" in refusal(HUB_ID)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert "has no config.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "word"])
def test_a_path_that_leads_nowhere_is_refused_with_what_to_give(model):
    assert f"no model at {model!r}: give a folder" in refusal(model)


def test_a_revision_goes_with_a_hub_id_only():
    assert "--revision v9 goes with a hub id, not with the folder" in refusal(str(CHECKPOINT), "v9")
    assert "not with the bundled model" in refusal(None, "v9")


# --- the hub's own client against a hub on the loopback ----------------------------------------

ANSWERS = {
    "gated": (403, "GatedRepo", "is gated: accept its licence"),
    "missing": (404, "RepoNotFound", "the hub has no model"),
    "revision": (404, "RevisionNotFound", "has no revision 'v9'"),
}


@contextmanager
def small_hub(status, code):
    """A hub that answers every request alike; yields its address and what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


COMMAND = "from vlmserve.server.cli.main import main; main()"


def serve(address, tmp_path):
    """The command line's last line and exit code for a hub id of that hub."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_of_a_test",
        "HF_HOME": str(tmp_path),
        "COLUMNS": "300",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", HUB_ID, "--revision", "v9"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    return done.stderr.strip().splitlines()[-1], done.returncode


@pytest.mark.parametrize("what", ANSWERS)
def test_what_the_hub_refuses_is_one_line_and_the_token_was_sent(what, tmp_path):
    status, code, message = ANSWERS[what]
    with small_hub(status, code) as (address, asked):
        line, exit_code = serve(address, tmp_path)
    assert message in line
    assert exit_code == 1
    tokens = {token for path, token in asked if f"/{HUB_ID}/" in path and "v9" in path}
    assert tokens == {"Bearer hf_of_a_test"}, asked


@pytest.mark.slow  # the hub's client tries for half a minute
def test_a_hub_that_nobody_answers_for_is_one_line(tmp_path):
    with small_hub(500, "") as (address, _):
        pass
    line, exit_code = serve(address, tmp_path)
    assert f"cannot reach the hub for {HUB_ID}, and it is not in the cache" in line
    assert exit_code == 1
