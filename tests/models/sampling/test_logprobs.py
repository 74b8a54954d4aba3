"""Log-probabilities: from the raw logits to what a client of either API reads."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    write_checkpoint,
)
from support.sampled import context_of, sample, told_of
from tokenizers import Tokenizer, decoders, models

from vlmserve.models.batch import SamplingParams, TokenLogprobs
from vlmserve.models.sampling.logprobs import RawLogprobs
from vlmserve.router.messages import AddRequest, SequenceOutput
from vlmserve.server.generation.answer_stream import AnswerStream
from vlmserve.server.generation.events import Finish, TextDelta
from vlmserve.server.generation.token_text import TokenReader
from vlmserve.server.prompts.processor import Processor
from vlmserve.server.settings import ServerSettings

TOKENIZER = meta_like_tokenizer()
READER = TokenReader(TOKENIZER)
EOT = 128009
ANSWER = "This image shows a böardwalk 🐻"
DEADLINE_S = 120.0


def ids_of(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return token_ids


# From logits


def test_logprobs_are_those_of_the_raw_logits_whatever_the_parameters() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits.double().log_softmax(-1)
    params = [
        SamplingParams(temperature=0.0, num_logprobs=0),
        SamplingParams(temperature=2.0, num_logprobs=5, repetition_penalty=2.0),
        SamplingParams(),
        SamplingParams(top_k=1, num_logprobs=20, logit_bias=((7, 100.0),)),
    ]
    raw = RawLogprobs(logits, params)
    context = context_of([1, 2, 3], [4], [5])
    token_ids = sample(logits, params, [0] * 4, [context] * 4)
    assert token_ids[3] == 7
    found = told_of(raw, token_ids)
    assert list(found) == [0, 1, 3]
    for row, one in found.items():
        assert one.logprob == pytest.approx(expected[row, token_ids[row]].item(), abs=1e-5)
        best = expected[row].topk(params[row].num_logprobs or 0)
        assert one.top_token_ids == best.indices.tolist()
        assert one.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_that_do_not_ask_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(torch.Tensor, "log_softmax", forbidden)
    raw = RawLogprobs(torch.zeros(3, 5), [SamplingParams()] * 3)
    assert told_of(raw, torch.zeros(3, dtype=torch.int64)) == {}


def test_a_token_without_a_chance_and_a_small_vocabulary_have_numbers_too() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    raw = RawLogprobs(logits, [SamplingParams(num_logprobs=20)])
    (one,) = told_of(raw, torch.tensor([1])).values()
    assert one.logprob == -9999.0
    assert one.top_token_ids == [2, 0, 1]
    assert all(math.isfinite(value) for value in one.top_logprobs)


# Tokens by themselves


@pytest.mark.parametrize(
    "text", [ANSWER, "日本語 \U0001f9d1‍\U0001f680 ñ\n\t\0\x7f­", " ".join("añ€🐻")]
)
def test_the_bytes_of_all_tokens_joined_are_the_text(text: str) -> None:
    read = [READER.read(token_id) for token_id in ids_of(text)]
    assert b"".join(one.text_bytes or b"" for one in read) == text.encode()
    assert "�" not in "".join(one.text for one in read)


def test_a_part_of_a_character_is_written_as_its_bytes() -> None:
    first, *rest = [READER.read(token_id) for token_id in ids_of("🐻")]
    assert rest
    assert first.text_bytes is not None
    assert first.text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in first.text_bytes)


def test_every_byte_has_its_token() -> None:
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizer_alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    read = [TokenReader(tokenizer).read(token_id).text_bytes for token_id in range(256)]
    assert sorted(read) == [bytes([byte]) for byte in range(256)]


def pre_tokenizer_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def test_special_tokens_have_a_name_and_no_bytes() -> None:
    assert READER.read(EOT).text == "<|eot_id|>"
    assert READER.read(EOT).text_bytes is None


def test_an_id_past_the_tokenizers_vocabulary_can_be_named() -> None:
    assert READER.read(999_999).text == "token_id:999999"


def test_a_tokenizer_without_a_byte_alphabet_reads_by_decoding() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "ĠÉ": 1}, unk_token="a"))
    assert TokenReader(tokenizer).read(1).text_bytes == "ĠÉ".encode()


# In a growing answer


def logprobs_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token_id), [token_id, 30], [-float(token_id), -0.5])


def output(token_ids: list[int], finish_reason: Any = None) -> SequenceOutput:
    return SequenceOutput(
        request_id="r",
        token_ids=token_ids,
        finish_reason=finish_reason,
        logprobs=[logprobs_of(token_id) for token_id in token_ids],
    )


def growing(stops: tuple[str, ...] = (), **sampling: Any) -> AnswerStream:
    request = AddRequest(
        request_id="r",
        prompt_token_ids=[1],
        max_tokens=99,
        sampling=SamplingParams(num_logprobs=2, **sampling),
    )
    return AnswerStream(request, stops, Processor(TOKENIZER, None, [EOT]), READER)


def told(event: TextDelta | Finish) -> list[int]:
    """The ids of the tokens that an event tells of."""
    return [round(-entry.chosen.logprob) for entry in event.logprobs]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("end", ["stop", "length"])
@pytest.mark.parametrize("stops", [(), ("walk!",), ("shows a b", "x"), ("🐻",)])
def test_every_token_is_told_of_once_and_in_order(
    size: int, end: str, stops: tuple[str, ...]
) -> None:
    token_ids = [*ids_of(ANSWER), *([EOT] if end == "stop" else [])]
    answer, events = growing(stops), []
    for begin in range(0, len(token_ids), size):
        part = token_ids[begin : begin + size]
        is_last = begin + size >= len(token_ids)
        events += answer.take(output(part, end if is_last else None))
        if events and isinstance(events[-1], Finish):
            break
    finish = events[-1]
    assert isinstance(finish, Finish)
    everything = [token_id for event in events for token_id in told(event)]
    assert everything == token_ids[: finish.usage.completion_tokens]
    if stops in ((), ("walk!",)):
        assert everything == token_ids


def test_a_piece_tells_of_the_tokens_that_it_brings() -> None:
    answer = growing(("image!",))
    what, image, mark = ids_of("What image?")
    assert told(answer.take(output([what]))[0]) == [what]
    # Its space is due, the rest may become the stop string.
    assert [told(event) for event in answer.take(output([image]))] == [[image]]
    text, finish = answer.take(output([mark, EOT], "stop"))
    assert (told(text), told(finish)) == ([mark], [EOT])


def test_the_tokens_of_a_split_character_come_with_it() -> None:
    answer, token_ids = growing(), ids_of("🐻")
    for token_id in token_ids[:-1]:
        assert answer.take(output([token_id])) == []
    (text,) = answer.take(output(token_ids[-1:]))
    assert text.text == "🐻"
    assert told(text) == token_ids


def test_min_tokens_keeps_stop_strings_from_ending_the_answer_before_it() -> None:
    token_ids = ids_of("What is What is")
    assert [TOKENIZER.id_to_token(token_ids[place]) for place in (0, 3)] == ["What"] * 2
    for min_tokens, text in ((0, ""), (1, "What is "), (3, "What is "), (4, "What is What is")):
        answer, events = growing(("What",), min_tokens=min_tokens), []
        for token_id in token_ids:
            events += answer.take(output([token_id]))
            if events and isinstance(events[-1], Finish):
                break
        shown = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert shown == text


# Over HTTP


def says_with_logprobs(request: AddRequest) -> Iterator[SequenceOutput]:
    """The answer token by token; log-probabilities where the request asks for them."""
    count = request.sampling.num_logprobs
    token_ids = [*ids_of(ANSWER), EOT]
    for token_id in token_ids:
        one = TokenLogprobs(-0.25, [token_id, 30][:count], [-0.25, -1.5][:count])
        yield SequenceOutput(
            request_id="r",
            token_ids=[token_id],
            finish_reason="stop" if token_id == EOT else None,
            logprobs=[] if count is None else [one],
        )


def post(tmp_path_factory: pytest.TempPathFactory, *bodies: tuple[str, dict[str, Any]]) -> list:
    async def run() -> list[httpx2.Response]:
        folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
        settings = ServerSettings(model=str(folder), engine_socket="", served_model_names=[MODEL])
        parts = {"engine_client": ScriptedEngine(says_with_logprobs), "images": OneTileImages()}
        async with (
            asyncio.timeout(DEADLINE_S),
            running_server(settings, **parts) as url,
            httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S) as client,
        ):
            return [await client.post(path, json=body) for path, body in bodies]

    return asyncio.run(run())


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "What?"}]}
STACK = {"model_id": MODEL, "messages": [{"role": "user", "content": "What?"}]}
OLD_PATH, NEW_PATH = "/inference/chat_completion", "/v1/inference/chat-completion"


def frames(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check_content(content: list[dict[str, Any]], num_top: int) -> None:
    """OpenAI's ChatCompletionTokenLogprob, one for each token of the answer and its end."""
    assert all(list(one) == ["token", "logprob", "bytes", "top_logprobs"] for one in content)
    assert len(content) == len(ids_of(ANSWER)) + 1
    assert bytes(b for one in content for b in one["bytes"] or []).decode() == ANSWER
    assert (content[-1]["token"], content[-1]["bytes"]) == ("<|eot_id|>", None)
    for one in content:
        assert one["logprob"] == -0.25
        assert len(one["top_logprobs"]) == num_top
        for rival in one["top_logprobs"]:
            assert list(rival) == ["token", "logprob", "bytes"]


def test_chat_completions_give_openais_logprobs_plain_and_streamed(tmp_path_factory) -> None:
    asks = [{"logprobs": True}, {"logprobs": True, "top_logprobs": 2}, {}]
    bodies = [CHAT | ask | {"stream": stream} for ask in asks for stream in (False, True)]
    answers = post(tmp_path_factory, *(("/v1/chat/completions", body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    for number, num_top in enumerate((0, 2)):
        plain, streamed = answers[2 * number], frames(answers[2 * number + 1])
        check_content(plain.json()["choices"][0]["logprobs"]["content"], num_top)
        choices = [chunk["choices"][0] for chunk in streamed]
        assert choices[0]["logprobs"] is None
        assert all(choice["logprobs"] for choice in choices[1:])
        check_content([e for c in choices[1:] for e in c["logprobs"]["content"]], num_top)
    assert answers[4].json()["choices"][0]["logprobs"] is None
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in frames(answers[5]))


@pytest.mark.parametrize("path", [OLD_PATH, NEW_PATH])
def test_llama_stack_gives_logprobs_by_token_plain_and_streamed(tmp_path_factory, path) -> None:
    asked = STACK | {"logprobs": {"top_k": 2}}
    plain, streamed, unasked = post(
        tmp_path_factory, (path, asked), (path, asked | {"stream": True}), (path, STACK)
    )
    expected = [
        {"logprobs_by_token": {READER.read(token_id).text: -0.25, "?": -1.5}}
        for token_id in [*ids_of(ANSWER), EOT]
    ]
    assert plain.json()["logprobs"] == expected
    events = [frame["event"] for frame in frames(streamed)]
    assert [one for event in events for one in event["logprobs"] or []] == expected
    assert events[0]["logprobs"] is None
    assert unasked.json()["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"128264": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 2**31 - 1}, "min_tokens"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(tmp_path_factory, fields, param) -> None:
    (answer,) = post(tmp_path_factory, ("/v1/chat/completions", CHAT | fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
