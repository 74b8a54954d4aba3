"""Amounts of memory, as the command line takes them."""

import pytest
from typer.testing import CliRunner

from vlmserve.server.cli import main as cli
from vlmserve.server.cli.byte_sizes import parse_bytes, parse_max_memory
from vlmserve.server.cli.main import app


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500000000", 500_000_000),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("64KiB", 65_536),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_an_amount_is_read_with_its_unit(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "8 gallons", "-1GiB", "1e9", "0", "0.1B", "1GiB2"])
def test_what_is_no_amount_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_bytes(text)


def test_the_command_line_refuses_what_is_no_amount():
    result = CliRunner().invoke(app, ["serve", "--kv-cache-memory", "lots"])
    assert result.exit_code == 2
    assert "'lots' is not an amount of memory" in " ".join(result.output.replace("│", " ").split())


def test_memory_by_device_is_read_with_its_units():
    expected = {"0": 20 << 30, "11": 500_000_000, "cpu": 40 << 30}
    assert parse_max_memory("0=20GiB, 11=500MB,cpu = 40GiB") == expected


@pytest.mark.parametrize(
    "text",
    ["", "20GiB", "0=", "gpu=1GiB", "0=1GiB;cpu=2GiB", "0=1GiB,0=2GiB", "-1=1GiB", "0=1GiB,"],
)
def test_what_is_no_memory_by_device_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_max_memory(text)


def test_placement_and_memory_options_reach_the_engine(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, engine, *others):
            seen.append(engine)

        async def run(self):
            return 0

    monkeypatch.setattr(cli, "Supervisor", Recorder)
    options = "--port 0 --device-map balanced --max-memory 0=20GiB,cpu=1GiB"
    command = ["serve", *options.split(), "--gpu-memory-utilization", "0.8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (engine,) = seen
    assert engine.device_map == "balanced"
    assert engine.max_memory == {"0": 20 << 30, "cpu": 1 << 30}
    assert engine.gpu_memory_utilization == 0.8
