"""`vlmserve bench compare`: two results of bench serve, level by level."""

import json

import pytest
from typer.testing import CliRunner

from vlmserve.server.cli.main import app

LEVEL = {
    "concurrency": 4, "request_rate": None, "tokens_per_s": 100.0, "requests_per_s": 5.0,
    "goodput_per_s": None, "ttft_p50_ms": 50.0, "ttft_p99_ms": 90.0, "inter_token_p50_ms": 10.0,
    "inter_token_p99_ms": 12.0, "end_to_end_p50_ms": 500.0, "end_to_end_p99_ms": 700.0,
}  # fmt: skip
RESULT = {
    "model": "m", "load": {"max_tokens": 64, "seed": 1}, "slo": {"ttft_ms": None},
    "client": {"cores": 2}, "levels": [LEVEL],
}  # fmt: skip


@pytest.fixture
def result(tmp_path):
    """result(name, **changes of its level) -> the path of a result."""

    def write(name, document=RESULT, **level):
        path = tmp_path / name
        path.write_text(json.dumps(document | {"levels": [LEVEL | level]}))
        return str(path)

    return write


def compare(*arguments):
    return CliRunner().invoke(app, ["bench", "compare", *arguments])


def test_each_figure_of_b_is_divided_by_that_of_a(result):
    done = compare(result("a.json"), result("b.json", tokens_per_s=150.0, ttft_p50_ms=25.0))
    assert done.exit_code == 0, done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    assert (level["level"], level["tokens_per_s"], level["ttft_p50_ms"]) == ("4 at once", 1.5, 0.5)
    assert level["goodput_per_s"] is None
    assert "b.json divided by a.json" in done.stderr
    assert "1.50" in done.stderr


def test_settings_that_differ_are_named(result):
    other = RESULT | {"load": {"max_tokens": 128, "seed": 1}}
    done = compare(result("a.json"), result("b.json", document=other))
    assert json.loads(done.stdout)["notes"] == ["load.max_tokens differs: 64 and 128"]
    assert "note: load.max_tokens differs" in done.stderr


def test_results_without_a_common_level_are_refused(result):
    done = compare(result("a.json"), result("b.json", concurrency=8))
    assert done.exit_code == 1
    assert "no level in common" in done.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is not JSON"), ("[]", "has no levels"), ('{"levels": 3}', "has no")],
)
def test_a_file_that_is_no_result_is_named(result, tmp_path, content, reason):
    path = tmp_path / "other.json"
    path.write_text(content)
    done = compare(result("a.json"), str(path))
    assert done.exit_code == 1
    assert reason in done.stderr
    missing = compare(str(tmp_path / "none.json"), str(path))
    assert "cannot read" in missing.stderr


def test_both_results_are_drawn_above_each_other(result, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "both.png"
    done = compare(result("a.json"), result("b.json"), "--plot", str(target))
    assert done.exit_code == 0, done.stderr
    assert target.read_bytes().startswith(b"\x89PNG")
    assert compare(result("a.json"), result("b.json"), "--plot", "x.pdf").exit_code == 1
