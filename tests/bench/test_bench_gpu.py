"""`bench/gpu.py` on a CPU: its rows, its document, and what failures and a short budget leave.

No figure is asserted. What needs a GPU stands in test_gpu.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.attention_cases import needs_interpreter
from support.taped import TapeRecorder, tape_operations, taped_backend

from vlmserve.bench.bounds import Machine, decode_work
from vlmserve.bench.checkpoints import layout
from vlmserve.bench.gpu_bench import child, document, products, tests_on_gpu
from vlmserve.bench.gpu_bench.child import Child
from vlmserve.bench.gpu_bench.document import DROPPED, FAILED, NOT_AVAILABLE, OK, aims
from vlmserve.bench.gpu_bench.paths import lay_out, missing
from vlmserve.bench.gpu_bench.plan import (
    FULL,
    INT8,
    LOADS,
    ONE_TILE,
    PLAIN,
    TINY,
    Row,
    expected_s,
    rows_of,
)
from vlmserve.bench.gpu_bench.run import Limits, Watch, failed_with
from vlmserve.bench.gpu_bench.verdict import ELSEWHERE, STATEMENTS, verdict
from vlmserve.models.batch import PoolSizes
from vlmserve.models.decoder.decoder import FusedDecoder
from vlmserve.models.decoder.int8.product import fused_product
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.device_map import on_one_device
from vlmserve.models.weights.loader import load
from vlmserve.models.weights.meta_model import empty_model
from vlmserve.models.weights.random_weights import random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.py"
RAISES, DIES = "decode/none/eager/text/1", "decode/int8/eager/image/1"


# far above what a run takes: a busy machine must end none early
SLOW = ["--budget-s", "3000", "--row-limit-s", "900", "--start-limit-s", "900"]


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--tiny", "--out", str(folder), *SLOW, *options]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run of one sequence a step in which one row raises and one kills its process."""
    folder = tmp_path_factory.mktemp("gpu")
    options = ["--skip-tests", "--batches", "1"]
    options += ["--rehearse", f"{RAISES}=raise", "--rehearse", f"{DIES}=die"]
    done = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=1500)
    return folder, done


def last_document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return content


@pytest.mark.slow
def test_the_last_line_is_the_document_that_is_saved(rehearsed) -> None:
    folder, done = rehearsed
    found = last_document(done)
    assert json.loads((folder / document.FILE).read_text()) == found
    assert sorted(file.name for file in folder.iterdir()) == [document.FILE, document.LOG_FILE]
    assert "RehearsedError" not in (folder / document.LOG_FILE).read_text()  # it is in its row
    assert {"device", "torch", "triton", "commit", "nvidia_smi", "command"} <= set(found["machine"])
    assert found["settings"]["model"] == "tiny"
    for quantize in (PLAIN, INT8):
        assert found["bandwidth"][quantize]["bytes_per_s"] > 0
        assert found["runners"][f"{quantize}/graphs"]["said"][0].startswith("attention by sdpa")
    assert len(found["aims"]) == 4


@pytest.mark.slow
def test_every_row_that_was_planned_has_one_entry(rehearsed) -> None:
    rows = last_document(rehearsed[1])["rows"]
    planned = [row.id for quantize in (PLAIN, INT8) for row in rows_of(quantize, (1,))]
    assert sorted(row["row"] for row in rows) == sorted(planned)


@pytest.mark.slow
def test_a_row_that_raises_is_recorded_with_its_error_and_the_others_go_on(rehearsed) -> None:
    rows = {row["row"]: row for row in last_document(rehearsed[1])["rows"]}
    assert rows[RAISES]["status"] == FAILED
    assert "RehearsedError: as --rehearse asked" in rows[RAISES]["error"]
    assert rows["decode/none/eager/image/1"]["status"] == OK


@pytest.mark.slow
def test_a_row_that_kills_its_process_costs_only_itself(rehearsed) -> None:
    rows = {row["row"]: row for row in last_document(rehearsed[1])["rows"]}
    assert rows[DIES]["status"] == FAILED
    assert "ended with code 9" in rows[DIES]["error"]
    failed = [name for name, row in rows.items() if row["status"] == FAILED]
    assert sorted(failed) == sorted([RAISES, DIES])
    assert rehearsed[1].returncode == 1


@pytest.mark.slow
def test_a_device_without_graphs_says_why(rehearsed) -> None:
    rows = last_document(rehearsed[1])["rows"]
    found = {(row["status"], row["why"]) for row in rows if row["mode"] == "graphs"}
    assert found == {(NOT_AVAILABLE, "they need a CUDA device, and this is cpu")}


@pytest.mark.slow
def test_each_row_is_printed_as_it_ends(rehearsed) -> None:
    lines = rehearsed[1].stdout.splitlines()[:-1]
    for row in last_document(rehearsed[1])["rows"]:
        assert any(line.startswith(row["row"]) for line in lines)


@pytest.mark.slow
def test_rows_hold_their_figures_beside_the_bound(rehearsed) -> None:
    good = [row for row in last_document(rehearsed[1])["rows"] if row["status"] == OK]
    kinds = {"decode", "prefill", "encode", "products", "profile"}
    assert {row["kind"] for row in good} == kinds
    for row in good:
        if row["kind"] == "decode":
            assert row["tokens_per_s"] == pytest.approx(1e3 / row["step_ms"], rel=1e-2)
            assert row["share_of_bound"] == pytest.approx(
                row["bound_ms"] / row["step_ms"], abs=2e-4
            )
            assert row["context"] > row["steps"]
        elif row["kind"] == "encode":
            assert 0 < row["encode_ms"] <= row["step_ms"]
            assert row["tiles"] == (1 if row["load"] else 4)
            assert row["bound_ms"] > 0
        elif row["kind"] == "prefill":
            assert row["tokens_per_s"] > 0
        elif row["kind"] == "products":
            # int8 has an entry for each number of rows
            names = list(dict.fromkeys(entry["product"] for entry in row["products"]))
            head = [] if row["quantize"] == INT8 else ["head"]
            assert names == ["qkv", "out", "gate and up", "down", *head]
            assert all(entry["us"] > 0 for entry in row["products"])
        else:
            assert row["top"][0]["us"] > 0


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_still_prints_what_it_has(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "--skip-tests"), stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(900) == 1
    found = json.loads(rest.strip().splitlines()[-1])
    assert found["rows"][0]["row"] == first.split()[0]
    assert found["notes"] == ["the run was asked to end early"]
    assert json.loads((tmp_path / document.FILE).read_text()) == found


def test_a_budget_without_time_drops_every_row_by_name(tmp_path: Path) -> None:
    options = ["--skip-tests", "--budget-s", "1"]
    done = subprocess.run(command(tmp_path, *options), capture_output=True, text=True, timeout=600)
    rows = last_document(done)["rows"]
    assert len(rows) == sum(len(rows_of(one, TINY.batches)) for one in (PLAIN, INT8))
    assert {row["status"] for row in rows} == {DROPPED}
    assert done.returncode == 1


def told(tmp_path: Path, rows: list[Row], deadline: float) -> dict[str, Any]:
    """What a run tells its measuring process."""
    return {
        "size": asdict(TINY),
        "rows": [asdict(row) for row in rows],
        "deadline": deadline,
        "events": str(tmp_path / "events.jsonl"),
        "rehearse": {},
    }


def events_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


def test_a_row_that_would_outlast_the_budget_is_dropped_with_the_reason(tmp_path: Path) -> None:
    """Before anything is built for it."""
    rows = [row for row in rows_of(PLAIN, TINY.batches) if row.mode == "eager"]
    Child(told(tmp_path, rows, time.monotonic() + 1.0)).run()
    ends = [event for event in events_of(tmp_path) if event["event"] == "row"]
    assert [event["row"] for event in ends] == [row.id for row in rows]
    assert {event["status"] for event in ends} == {DROPPED}
    assert "were left and it takes" in ends[0]["why"]
    assert not any(event["event"] == "building" for event in events_of(tmp_path))


def test_what_cannot_be_built_fails_its_rows_once_and_for_all(tmp_path: Path) -> None:
    rows = [row for row in rows_of(PLAIN, TINY.batches) if row.mode == "eager"][:3]
    content = told(tmp_path, rows, time.monotonic() + 1000)
    content["size"]["model"] = "of no known layout"
    Child(content).run()
    events = events_of(tmp_path)
    ends = [event for event in events if event["event"] == "row"]
    assert {event["status"] for event in ends} == {FAILED}
    assert all("'of no known layout' is unknown" in event["error"] for event in ends)
    assert sum(event["event"] == "building" for event in events) == 1


@pytest.mark.slow
def test_rows_that_load_a_step_hold_what_they_are_named_after(tmp_path: Path) -> None:
    """A long row among others, a chunk beside decodes, top-p, and an image of one tile."""
    rows = [Row("decode", PLAIN, "eager", 2, load=load) for load in LOADS]
    rows.append(Row("encode", PLAIN, "eager", has_image=True, load=ONE_TILE))
    Child(told(tmp_path, rows, time.monotonic() + 3000)).run()
    ends = [event for event in events_of(tmp_path) if event["event"] == "row"]
    assert [event["status"] for event in ends] == [OK] * 4, ends
    long, _, top_p, encoded = ends
    assert long["context"] > TINY.long_tokens / 2
    assert top_p["context"] < TINY.long_tokens / 2 + TINY.steps + TINY.warm_steps
    assert [one["tokens"] for one in ends[:3]] == [2, 2 + TINY.chunk, 2]
    assert all(one["step_ms"] > 0 and one["bound_ms"] > 0 for one in ends)
    assert encoded["tiles"] == 1
    assert all(one["estimate_ms"] is None for one in ends)  # not of a CPU


def gpu_document() -> dict[str, Any]:
    """A document in which every row was measured on a GPU."""
    rows = [
        {"row": one.id, "status": OK, "replayed": 100, **asdict(one)}
        for quantize in (PLAIN, INT8)
        for one in rows_of(quantize, FULL.batches)
    ]
    machine = {"device": "a GPU", "capability": [9, 0], "commit": "0123456"}
    return {"machine": machine, "rows": rows, "tests": {"passed": 9, "failed": 0}, "aims": aims([])}


def test_a_verdict_names_the_statements_that_a_run_settles() -> None:
    found = gpu_document()
    lines = verdict(found)
    assert sum(line.startswith("can go") for line in lines) == len(STATEMENTS)
    assert lines[-1].startswith("not measured")
    found["tests"]["failed"] = 1
    assert "stays   README.md: serving on a GPU" in verdict(found)
    found["rows"] = [row for row in found["rows"] if row["quantize"] != INT8]
    assert any(line.startswith("stays   docs/quantization.md") for line in verdict(found))
    del found["machine"]["capability"]
    assert not any(line.startswith("can go") for line in verdict(found))


def test_every_page_that_calls_something_unverified_is_known_to_the_verdict() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    marked = {
        str(file.relative_to(ROOT)) for file in files if "unverified" in file.read_text("utf-8")
    }
    known = {page for page, _, _ in STATEMENTS}
    assert known <= marked
    unknown = marked - known - {*ELSEWHERE, "docs/log.md"}
    assert not unknown, f"bench/gpu_bench/verdict.py must list {unknown}"


def test_a_verdict_is_printed_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_document()))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--verdict", str(tmp_path / "gpu.json")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "can go  docs/settings.md: --cuda-graphs" in done.stdout


@pytest.mark.slow
@needs_interpreter()
def test_replayed_steps_are_rows_like_others_and_eager_ones_follow_on_the_same_runner(
    tmp_path: Path, monkeypatch
) -> None:
    """Kernels in Triton's interpreter, a tape in the place of CUDA's graphs (support/taped.py)."""
    recorder = TapeRecorder()
    tape_operations(recorder, monkeypatch)
    built = []

    def make_runner(size, row) -> ModelRunner:
        opened = random_checkpoint(layout("tiny"), torch.float32)
        model = load(opened, on_one_device(opened.meta_model, torch.device("cpu")))
        plan = PoolPlan(PoolSizes(12, 8, 16), size.max_model_len)
        runner = ModelRunner(model, plan, taped_backend(recorder, 1))
        runner._fused = FusedDecoder(model.model.model.language_model, TritonOperations())
        runner.record_graphs(1, recorder)
        built.append(runner)
        return runner

    monkeypatch.setattr(child, "make_runner", make_runner)
    rows = [
        Row("decode", PLAIN, "graphs", has_image=True),
        Row("decode", PLAIN, "eager"),
    ]
    content = told(tmp_path, rows, time.monotonic() + 3000)
    content["size"] |= {"context": 3, "warm_steps": 1, "steps": 2}
    Child(content).run()
    ends = [event for event in events_of(tmp_path) if event["event"] == "row"]
    assert [event["status"] for event in ends] == [OK] * 2, ends
    assert [event["replayed"] for event in ends] == [2 + 1, 0]
    assert len(built) == 1


def test_a_row_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "begin", "row": "decode/none/eager/text/1"}\n')
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        limits = Limits(start_s=600, row_s=0.2, deadline=time.monotonic() + 600)
        watch = Watch(process, events, limits)
        assert [event["event"] for event in watch.events()] == ["begin"]
    assert watch.current == "decode/none/eager/text/1"
    assert watch.why == "ended: it took longer than a row or a start may take"


def watched(tmp_path: Path, *events: dict[str, Any]) -> Watch:
    """The watch over a process that told these events and died."""
    file = tmp_path / "told.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    with subprocess.Popen([sys.executable, "-c", "import os; os._exit(9)"]) as process:
        limits = Limits(600, 600, time.monotonic() + 600)
        watch = Watch(process, file, limits)
        assert list(watch.events()) == list(events)
    return watch


def test_a_process_takes_with_it_what_would_fail_again(tmp_path: Path) -> None:
    rows = rows_of(PLAIN, TINY.batches)
    graphs, eager = ([row for row in rows if row.mode == mode] for mode in ("graphs", "eager"))
    building = {"event": "building", "row": graphs[0].id}
    begin = {"event": "begin", "row": eager[1].id}
    ended = {"event": "row", "row": graphs[0].id}
    assert failed_with(watched(tmp_path), rows) == rows
    assert failed_with(watched(tmp_path, building), rows) == graphs
    assert failed_with(watched(tmp_path, begin), rows) == [eager[1]]
    assert failed_with(watched(tmp_path, building, ended), rows[1:]) == []


def test_what_matters_most_is_measured_first() -> None:
    rows = rows_of(PLAIN, FULL.batches)
    assert (rows[0].kind, rows[0].batch, rows[0].has_image) == ("decode", 1, False)
    decodes = {(r.mode, r.batch, r.has_image) for r in rows if r.kind == "decode"}
    assert len(decodes) == 2 * 4 * 2
    assert expected_s(rows[0], {"decode": 3.0}) == 3.0
    assert expected_s(rows[0], {}) > 0


@pytest.mark.slow
@needs_interpreter()
def test_a_sweep_tries_every_tiling_and_notes_those_that_fail(monkeypatch) -> None:
    def refuse(rows, codes, scales, tiles):
        if tiles.block_n == 128:
            raise RuntimeError("out of resource: shared memory")
        return fused_product(rows, codes, scales, tiles)

    monkeypatch.setattr(products, "fused_product", refuse)
    config = layout("tiny").text_config
    config.hidden_size, config.intermediate_size = 32, 48
    runner: Any = SimpleNamespace(config=SimpleNamespace(text_config=config))
    size = replace(TINY, batches=(1,), sweeps=True)
    found = products.products(runner, Row("products", INT8, "eager"), size, Machine(1.0, 1e3))[
        "products"
    ]
    qkv = [entry for entry in found if entry["product"] == "qkv"]
    assert len(qkv) == 1 + len(products.SWEPT) + len(products.INT8_ROWS)
    assert [entry["error"] for entry in qkv if "error" in entry] == [
        "out of resource: shared memory"
    ]
    assert all(entry["share_of_bandwidth"] > 0 for entry in qkv if "error" not in entry)


def row(quantize: str, batch: int, **figures: Any) -> dict[str, Any]:
    entry = {"kind": "decode", "content": "text", "status": OK, "quantize": quantize}
    return entry | {"batch": batch, **figures}


def test_aims_are_of_the_better_mode_and_null_where_nothing_was_measured() -> None:
    rows = [
        row(PLAIN, 1, share_of_bound=0.5, tokens_per_s=80.0),
        row(PLAIN, 1, share_of_bound=0.9, tokens_per_s=150.0),
        row(INT8, 1, share_of_bound=0.7, tokens_per_s=210.0),
    ]
    share, speedup, many, chunk = aims(rows)
    assert (share["value"], share["passed"]) == (0.9, True)
    assert (speedup["value"], speedup["passed"]) == (1.4, False)
    assert (many["value"], many["passed"]) == (None, None)
    assert aims([*rows, row(INT8, 64, tokens_per_s=5001.0)])[2]["passed"]
    assert chunk["passed"] is None
    beside = [row(PLAIN, 64, tokens_per_s=6000.0), row(PLAIN, 64, load="chunk", tokens_per_s=4e3)]
    assert aims(beside)[3]["value"] == 0.6667
    assert aims(beside)[2]["value"] == 6000.0
    failed = {**row(PLAIN, 64), "status": NOT_AVAILABLE}
    assert aims([failed])[2]["passed"] is None


def test_the_published_shape_has_the_published_number_of_parameters() -> None:
    model = empty_model(layout("11b"), torch.bfloat16)
    assert sum(one.numel() for one in model.parameters()) == 10_670_220_835
    assert model.model.vision_model.num_patches == 1601


def test_int8_weights_halve_what_a_step_reads_of_the_layers_alone() -> None:
    config = layout("tiny").text_config
    plain, quantized = decode_work(config, 4, 9, 5, 2), decode_work(config, 4, 9, 5, 2, 1)
    none = decode_work(config, 4, 9, 5, 2, 0)
    assert plain.flops == quantized.flops
    layers = decode_work(config, 4, 9, 5, 1).num_bytes
    assert plain.num_bytes == 2 * layers == none.num_bytes  # 0 is no size
    kept = 2 * (layers - (plain.num_bytes - quantized.num_bytes))
    assert plain.num_bytes - quantized.num_bytes == quantized.num_bytes - kept


def test_the_list_of_files_is_of_all_that_have_tests_for_a_gpu() -> None:
    marks = ("mark.gpu", "import SUBJECTS", "    SUBJECTS,\n")
    found = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if file.name != Path(__file__).name and any(m in file.read_text("utf-8") for m in marks)
    ]
    assert sorted(found) == sorted(tests_on_gpu.FILES)


def test_tests_run_in_shares_and_each_end_is_counted(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='there is no device')\n"
        "def test_away(): pass\n"
    )
    environment = lay_out(tmp_path / "path", None)
    found = tests_on_gpu.run_tests(
        [str(tmp_path / "test_some.py")], environment, tmp_path, 900, num_processes=2
    )
    counts = {name: found[name] for name in ("passed", "failed", "skipped", "selected")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "selected": 3}
    assert found["cut_short"] == 0
    assert "test_bad" in found["failures"][0]["test"]
    assert "assert (1 + 1) == 3" in found["failures"][0]["error"]
    assert found["skips"] == ["Skipped: there is no device"]


def test_tests_that_cannot_run_count_asfailed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    environment = lay_out(tmp_path / "path", None)
    file = str(tmp_path / "test_broken.py")
    found = tests_on_gpu.run_tests([file], environment, tmp_path, 900, num_processes=1)
    assert found["failed"] == 1
    assert "a_package_that_is_not_there" in found["failures"][0]["error"]


def test_only_wheels_of_what_is_lacking_are_unpacked(tmp_path: Path) -> None:
    wheels, path = tmp_path / "wheels", tmp_path / "path"
    wheels.mkdir()
    path.mkdir()
    for name in ("not_there_at_all", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    environment = lay_out(path, wheels)
    code = "import not_there_at_all, numpy, vlmserve; print(len(numpy.__version__) > 0)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "True\n"
    packages = ("not_there_at_all", "nor_this", "numpy")
    assert missing(packages, environment["PYTHONPATH"]) == ["nor_this"]
