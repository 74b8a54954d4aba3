"""`--ray` and what belongs to it, where Ray is not installed. With Ray: tests/whole/test_ray.py."""

import importlib.util

import pytest
from typer.testing import CliRunner

from vlmserve.server.cli import main as cli


@pytest.fixture
def start(monkeypatch):
    """start(*arguments): what `vlmserve serve` with them does."""
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    return lambda *arguments: CliRunner().invoke(cli.app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("arguments", "address", "model"),
    [
        (["folder", "--ray"], "auto", "folder"),
        (["--ray", "--replicas", "2"], "auto", None),
        (["--ray", "10.0.0.1:6379", "folder"], "10.0.0.1:6379", "folder"),
        (["--ray=local", "folder"], "local", "folder"),
    ],
)
def test_the_address_may_be_left_out(monkeypatch, start, arguments, address, model):
    seen = []
    monkeypatch.setattr(cli, "_serve_on_ray", seen.append)
    assert start(*arguments).exit_code == 0
    assert (seen[0]["ray"], seen[0]["model"]) == (address, model)


def test_without_ray_the_package_is_named(monkeypatch, start):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (name != "ray" and find(name)) or None
    )
    done = start("--ray", "local")
    assert done.exit_code == 1
    assert "pip install 'vlmserve[ray]'" in done.output


def test_autoscaling_needs_ray(start):
    done = start("--max-replicas", "3")
    assert done.exit_code == 1
    assert "--max-replicas needs --ray" in done.output
