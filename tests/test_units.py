"""Amounts of memory, as the command line takes them."""

import pytest
from typer.testing import CliRunner

from vlmserve.server.cli import app
from vlmserve.server.units import parse_bytes


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
    assert "'lots' is no amount of memory" in " ".join(result.output.replace("│", " ").split())
