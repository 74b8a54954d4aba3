"""`vlmserve run-batch`: what is read, what is written, what is tried again, what is skipped."""

import asyncio
import json

import pytest
from PIL import Image
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)

from vlmserve.router.errors import QueueFullError
from vlmserve.server.batch import runner
from vlmserve.server.batch.requests import BatchError, PictureFolder, RequestFile
from vlmserve.server.batch.results import Results
from vlmserve.server.batch.runner import BatchOptions, run_batch
from vlmserve.server.settings import ServerSettings

TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"


def line(custom_id, url=CHAT, **body):
    content = body or {"messages": [{"role": "user", "content": f"What {custom_id}"}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": content})


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(checkpoint, requests, out, script=None, images=None, *, end="", keys=(), **options):
    """The counts of a run against a server with a scripted engine, and the engine's requests.

    end: what follows the server's address. keys: those that it asks for.
    """
    says = script or (lambda request: list(tokens_one_by_one(TOKENIZER, "What?")))

    async def scenario():
        engine = ScriptedEngine(says)
        settings = ServerSettings(
            model=str(checkpoint),
            engine_socket="",
            served_model_names=[MODEL],
            api_keys=list(keys),
        )
        images_of = images or OneTileImages()
        async with running_server(settings, engine_client=engine, images=images_of) as url:
            results = Results(out)
            try:
                counts = await run_batch(requests, results, BatchOptions(url + end, **options))
            finally:
                results.close()
            return counts, engine.requests

    return asyncio.run(scenario())


def results_of(out):
    return [json.loads(one) for one in out.read_text().splitlines()]


def test_each_line_has_one_result_in_openai_s_form(checkpoint, files):
    source, out = files
    source.write_text("\n".join([
        line("a"), "", line("b", "/v1/completions", prompt="What"),
        line("c", "/v1/responses", input="What"),
        line("d", "/v1/messages", max_tokens=4, messages=[{"role": "user", "content": "What"}]),
    ]))  # fmt: skip
    requests = RequestFile(source)
    assert requests.check() == 4
    counts, _ = run(checkpoint, requests, out)
    results = {result["custom_id"]: result for result in results_of(out)}
    assert (counts.num_done, counts.num_failed, sorted(results)) == (4, 0, list("abcd"))
    for result in results.values():
        assert result["id"].startswith("batch_req_")
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        assert result["response"]["request_id"]
        assert result["response"]["body"]["model"] == MODEL
    assert results["a"]["response"]["body"]["choices"][0]["message"]["content"] == "What?"


def test_what_is_wrong_with_a_line_is_its_result(checkpoint, files):
    source, out = files
    source.write_text("\n".join([
        "{", line("get").replace("POST", "GET"), line("url", "/v1/files"),
        line("stream", stream=True), line("refused", messages=[]), '{"custom_id": "empty"}',
        line("good"),
    ]))  # fmt: skip
    counts, _ = run(checkpoint, RequestFile(source), out)
    results = {result["custom_id"]: result for result in results_of(out)}
    assert (counts.num_done, counts.num_failed) == (1, 6)
    assert results["refused"]["response"]["status_code"] == 400
    for custom_id, word in {
        "line-1": "line 1 is invalid", "get": "only POST", "url": "/v1/files",
        "stream": "stream", "empty": "url",
    }.items():  # fmt: skip
        assert results[custom_id]["response"] is None
        assert results[custom_id]["error"]["code"] == "invalid_line"
        assert word in results[custom_id]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{line('a')}\n{line('b')}\n{line('a')}", "request 3 of .* 'a' of request 1"),
        ("\n\n", "has no requests"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(files, text, message):
    if text is not None:
        files[0].write_text(text)
    with pytest.raises(BatchError, match=message):
        RequestFile(files[0]).check()


def test_a_folder_of_pictures_is_one_request_each(checkpoint, files, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "below/c.webp"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    requests = PictureFolder(folder, "What is this?", {"max_tokens": 5})
    assert requests.check() == 3
    images = OneTileImages()
    counts, sent = run(checkpoint, requests, files[1], images=images)
    assert counts.num_done == 3
    assert sorted(one["custom_id"] for one in results_of(files[1])) == [
        "a.JPG",
        "b.png",
        "below/c.webp",
    ]
    assert {request.max_tokens for request in sent} == {5}
    assert sorted(image.url[:16] for image in images.requests) == [
        "data:image/jpeg;", "data:image/png;b", "data:image/webp;",
    ]  # fmt: skip


def test_a_folder_without_pictures_is_one_line(tmp_path):
    for folder, message in ((tmp_path, "has no pictures"), (tmp_path / "none", "not a folder")):
        with pytest.raises(BatchError, match=message):
            PictureFolder(folder, "What?", {}).check()


def test_a_second_run_does_what_has_no_result(checkpoint, files):
    source, out = files
    source.write_text("\n".join(map(line, "abc")))
    run(checkpoint, RequestFile(source), out)
    whole, cut = out.read_text().splitlines(keepends=True)[:2]
    out.write_text(whole + cut[:-9])
    counts, requests = run(checkpoint, RequestFile(source), out)
    assert (counts.num_skipped, counts.num_done, len(requests)) == (1, 2, 2)
    assert sorted(result["custom_id"] for result in results_of(out)) == ["a", "b", "c"]


def test_a_refusal_that_passes_is_tried_again(checkpoint, files, monkeypatch):
    pauses, pause_s = [], runner._pause_s

    def no_pause(*arguments):
        pauses.append(pause_s(*arguments))
        return 0.0

    monkeypatch.setattr(runner, "_pause_s", no_pause)
    answers = [[QueueFullError("full", retry_after_s=7.0)]] * 2

    def script(request):
        return answers.pop() if answers else list(tokens_one_by_one(TOKENIZER, "What?"))

    files[0].write_text(line("a"))
    counts, _ = run(checkpoint, RequestFile(files[0]), files[1], script, concurrency=1)
    assert (counts.num_done, pauses) == (1, [7.0, 7.0])


def test_a_refusal_that_stays_is_the_result(checkpoint, files):
    files[0].write_text(line("a"))
    counts, _ = run(
        checkpoint, RequestFile(files[0]), files[1],
        lambda request: [QueueFullError("full", retry_after_s=1.0)], max_retries=0,
    )  # fmt: skip
    assert counts.num_failed == 1
    assert results_of(files[1])[0]["response"]["status_code"] == 429


def test_no_more_than_concurrency_are_sent_at_once(checkpoint, files):
    files[0].write_text("\n".join(line(str(number)) for number in range(40)))
    _, requests = run(checkpoint, RequestFile(files[0]), files[1], concurrency=4)
    assert len(requests) == 40


def test_a_server_that_cannot_be_asked_is_one_line(files):
    files[0].write_text(line("a"))

    async def scenario():
        results = Results(files[1])
        await run_batch(RequestFile(files[0]), results, BatchOptions("http://127.0.0.1:1"))

    with pytest.raises(BatchError, match=r"http://127\.0\.0\.1:1.* cannot be asked"):
        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "is no address"),
        ("", "is no address"),
        ("ftp://host/v1", "is no address"),
        ("http://[::1", "is no address"),
    ],
)
def test_an_url_that_is_no_address_is_one_line(files, url, message):
    files[0].write_text(line("a"))
    results = Results(files[1])
    with pytest.raises(BatchError, match=message):
        asyncio.run(run_batch(RequestFile(files[0]), results, BatchOptions(url)))
    results.close()


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/"])
def test_the_address_may_end_as_openai_s_clients_write_it(checkpoint, files, end):
    """It was asked for /v1/v1/models."""
    files[0].write_text(line("a"))
    counts, _ = run(checkpoint, RequestFile(files[0]), files[1], end=end)
    assert counts.num_done == 1


def test_a_server_that_asks_for_a_key_says_where_to_put_it(checkpoint, files):
    files[0].write_text(line("a"))
    with pytest.raises(BatchError, match="set VLMSERVE_API_KEY"):
        run(checkpoint, RequestFile(files[0]), files[1], keys=["secret"])


def test_two_runs_cannot_write_one_file(files):
    first = Results(files[1])
    with pytest.raises(BatchError, match="another run"):
        Results(files[1])
    first.close()
    Results(files[1]).close()


def test_a_file_that_is_no_output_is_not_touched(files):
    files[1].write_text("my notes\n")
    with pytest.raises(BatchError, match="no result of a batch"):
        Results(files[1])
    assert files[1].read_text() == "my notes\n"
