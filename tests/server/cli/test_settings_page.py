"""docs/settings.md against the program, and what each variable really sets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from support import settings_page
from support.forked_command import run_forked
from typer.testing import CliRunner

from vlmserve.models.settings.option_parser import variable_of
from vlmserve.server.cli import build_settings
from vlmserve.server.cli import main as cli
from vlmserve.server.cli.environment import (
    ADOPTED,
    IGNORED,
    VariableError,
    adopt,
    without_effect,
)
from vlmserve.server.cli.listener import ListenError, listen
from vlmserve.server.cli.startup_checks import check_access, trace_settings
from vlmserve.server.settings import ServerSettings

SCRIPT = "tests/support/settings_page.py"
SERVE = [sys.executable, "-m", "vlmserve.server", "serve"]
PAGE = settings_page.PAGE.read_text()


def test_the_page_s_tables_are_the_declarations():
    assert settings_page.with_tables(PAGE) == PAGE, f"run `.venv/bin/python {SCRIPT}`"


def test_the_page_has_the_documented_variables_and_no_others():
    (section,) = (one for one in PAGE.split("\n## ") if one.startswith("The documented service's"))
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(settings_page.variables())
    for row in rows:
        assert ("no effect" in row) is (row.split("`")[1] in IGNORED)


@pytest.mark.parametrize("command", [("serve",), ("bench", "serve")], ids=" ".join)
def test_help_shows_whole_names_at_80_columns(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    found = typer.main.get_command(cli.app)
    for name in command:
        found = found.commands[name]
    for parameter in found.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("--"):
                assert re.search(rf"(?<!\S){re.escape(name)}(?![\w-])", result.output), name
    assert "…" not in result.output


def test_every_option_has_a_variable_of_its_own():
    own = {one.name: one.envvar for one in settings_page.parameters()}
    assert own == {name: variable_of(name) for name in own}
    assert {adopted.option for adopted in ADOPTED.values()} <= set(own)


class Seen(Exception):
    """Carries what the command would have started."""

    def __init__(self, engine, server, supervision):
        super().__init__()
        self.engine, self.server, self.supervision = engine, server, supervision


@pytest.fixture
def settings_for(monkeypatch):
    """settings_for(*arguments, **variables): the settings that a start would hand on."""

    class Caught:
        def __init__(self, engine, server, listener, on_ready, supervision, probes):
            raise Seen(engine, server, supervision)

    for name in list(os.environ):
        if name.startswith(("VLMSERVE_", "NIM_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "Supervisor", Caught)
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    # It starts a process for the template; tests/server/cli/test_template_at_start.py tests it.
    monkeypatch.setattr(build_settings, "check_template", lambda *_, **__: None)

    def start(*arguments, **variables):
        environ = dict(variables)
        adopt(environ)
        for name in {variable_of(one.name) for one in settings_page.parameters()}:
            monkeypatch.delenv(name, raising=False)
        result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *arguments], env=environ)
        assert isinstance(result.exception, Seen), result.output
        return result.exception

    return start


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"NIM_SERVED_MODEL_NAME": "a,b/c"}, ("server.served_model_names", ["a", "b/c"])),
        ({"NIM_MAX_MODEL_LEN": "512"}, ("engine.max_model_len", 512)),
        ({"NIM_MAX_IMAGES_PER_PROMPT": "3"}, ("server.images.max_images", 3)),
        ({"NIM_LOG_LEVEL": "WARNING"}, ("engine.log_level", "warning")),
        ({"NIM_LOG_LEVEL": "TRACE"}, ("server.log_level", "debug")),
        ({"NIM_TENSOR_PARALLEL_SIZE": "2"}, ("engine.tensor_parallel_size", 2)),
        ({"NIM_JSONL_LOGGING": "1"}, ("engine.log_format", "json")),
        ({"NIM_JSONL_LOGGING": "0"}, ("server.log_format", "text")),
        ({"NIM_DISABLE_LOG_REQUESTS": "1"}, ("server.log_requests", False)),
        ({"NIM_DISABLE_LOG_REQUESTS": "0"}, ("server.log_requests", True)),
        ({"NIM_ENABLE_KV_CACHE_REUSE": "0"}, ("engine.prefix_cache", False)),
        ({"NIM_ENABLE_KV_CACHE_REUSE": "1"}, ("engine.prefix_cache", True)),
        ({"NIM_ENABLE_OTEL": "1"}, ("server.traces.endpoint", None)),
        ({"NIM_ENABLE_OTEL": "0", "NIM_OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"},
         ("server.traces", None)),
        ({"NIM_OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, ("server.traces.endpoint", "http://c")),
        ({"NIM_ENABLE_OTEL": "1", "NIM_OTEL_SERVICE_NAME": "n"},
         ("server.traces.service_name", "n")),
        ({"VLMSERVE_API_KEY": "one two"}, ("server.api_keys", ["one", "two"])),
        ({"VLMSERVE_ALLOWED_HOST": "a b"}, ("server.allowed_hosts", ["a", "b"])),
        ({"VLMSERVE_CORS_ORIGIN": "*"}, ("server.cors_origins", ["*"])),
        ({"VLMSERVE_MAX_NUM_SEQS": "7"}, ("engine.max_num_seqs", 7)),
        ({}, ("server.traces", None)),
    ],
)  # fmt: skip
def test_a_variable_sets_its_option(settings_for, variables, found):
    path, value = found
    seen = settings_for(**variables)
    for name in path.split("."):
        seen = getattr(seen, name)
    assert seen == value


def test_a_flag_wins_over_the_own_variable_which_wins_over_the_documented_one(settings_for):
    both = {"NIM_MAX_MODEL_LEN": "100", "VLMSERVE_MAX_MODEL_LEN": "200"}
    assert settings_for(**both).engine.max_model_len == 200
    assert settings_for("--max-model-len", "300", **both).engine.max_model_len == 300
    empty = {"NIM_MAX_MODEL_LEN": "100", "VLMSERVE_MAX_MODEL_LEN": ""}
    assert settings_for(**empty).engine.max_model_len == 100


def test_names_may_be_repeated_or_stand_between_commas(settings_for):
    seen = settings_for("--served-model-name", "a, b,", "--served-model-name", "c,a")
    assert seen.server.served_model_names == ["a", "b", "c"]
    assert settings_for().server.served_model_names == ["vlmserve-tiny-vision"]


def test_the_port_may_come_from_the_documented_variable(monkeypatch):
    environ = {"NIM_SERVER_PORT": "1234"}
    adopt(environ)
    assert environ["VLMSERVE_PORT"] == "1234"


@pytest.mark.parametrize(
    ("name", "value"), [("NIM_JSONL_LOGGING", "perhaps"), ("NIM_LOG_LEVEL", "loud")]
)
def test_a_variable_that_says_nothing_is_one_clear_line(name, value):
    with pytest.raises(VariableError, match=f"{name} is '{value}'; it must be "):
        adopt({name: value})
    done = run_forked(["serve"], {name: value})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vlmserve: {name} is {value!r}")


def test_what_has_no_effect_is_named_without_its_value():
    environ = {"NGC_API_KEY": "secret", "NIM_MODEL_PROFILE": "2", "NIM_FOO": "secret"}
    environ |= {"VLMSERVE_MAX_IMAGE": "secret"}
    known = {"NIM_LOG_LEVEL": "INFO", "PATH": "/", "VLMSERVE_MAX_IMAGES": "2", "VLMSERVE_FOO": ""}
    lines = without_effect(environ | known, [one.name for one in settings_page.parameters()])
    assert [line.split(" ")[0] for line in lines] == sorted(environ)
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", ""], "an API key is empty"),
        (["--api-key", "one two"], "an API key is empty or contains a blank"),
        (["--api-key-file", "/nonexistent"], "the API key file cannot be read"),
        (["--tls-certfile", "/nonexistent"], "the TLS certificate and key cannot be used"),
        (["--tls-keyfile", "x"], "--tls-keyfile is given without --tls-certfile"),
        (["--cors-origin", "https://a.b/"], "--cors-origin 'https://a.b/' is not an origin"),
        (["--host", ""], "--host is empty"),
    ],
)
def test_a_setting_that_does_not_serve_is_one_clear_line(arguments, words):
    done = run_forked(["serve", "--port", "0", *arguments], {"NGC_API_KEY": ""})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vlmserve: {words}")


def settings_with(**fields) -> ServerSettings:
    return ServerSettings(model="m", engine_socket="", served_model_names=["m"], **fields)


@pytest.mark.parametrize(
    "host",
    ["a.example.com:8000", "http://a", "[::1]", "a.example.com.", "*", "*a", "a b", "", "a/b"],
)
def test_a_host_that_no_request_could_name_is_refused(host):
    """It used to be taken, and every request was answered 400."""
    with pytest.raises(ValueError, match=r"--allowed-host .* is not a host"):
        check_access(settings_with(allowed_hosts=["localhost", host]))


@pytest.mark.parametrize(
    "origin",
    ["chat.example.com", "https://a.b/", "https://a.b/c", "https://", "*.b", "https://*.b"],
)
def test_an_origin_that_no_page_could_have_is_refused(origin):
    """It used to be taken, and no page could read an answer."""
    with pytest.raises(ValueError, match=r"--cors-origin .* is not an origin"):
        check_access(settings_with(cors_origins=["http://localhost:3000", origin]))


def test_hosts_and_origins_as_requests_name_them_are_taken():
    hosts = ["api.example.com", "*.Example.com", "localhost", "127.0.0.1", "::1", "a_b"]
    origins = ["*", "null", "https://a.b", "http://[::1]:80", "chrome-extension://abc"]
    check_access(settings_with(allowed_hosts=hosts, cors_origins=origins))


def test_an_endpoint_for_traces_that_is_no_url_is_refused():
    for endpoint in ("collector", "collector:4318", "grpc://collector", "http://"):
        with pytest.raises(ValueError, match=r"--otlp-endpoint .* is not a URL"):
            trace_settings(None, endpoint, None, {})


def test_an_address_of_another_machine_is_not_answered_by_advice_about_ports():
    with pytest.raises(ListenError, match="--host must be an address of this machine"):
        listen("192.0.2.1", 0)


def test_a_start_that_fails_is_an_event_where_the_log_is_json():
    environ = {**os.environ, "NIM_JSONL_LOGGING": "1", "NIM_MODEL_PROFILE": "p"}
    done = subprocess.run(
        [*SERVE, "./nothing", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
    )
    assert done.returncode == 1
    ignored, failure = [json.loads(line) for line in done.stderr.splitlines()]
    assert ignored["message"].startswith("vlmserve: NIM_MODEL_PROFILE is set and has no effect")
    assert failure["message"].startswith("vlmserve: no model at './nothing'")
    assert (failure["level"], failure["process"]) == ("error", "supervisor")


def test_the_command_is_the_one_that_the_page_is_held_to():
    command = typer.main.get_command(cli.app)
    assert len(settings_page.parameters()) == len(command.commands["serve"].params)
