"""Prompts by Llama 3's published tokenizer: Meta's own ids, and the documented usage."""

import asyncio
import datetime
import json
from pathlib import Path

import pytest
from support.http_side import ScriptedEngine, client_of, tokens_one_by_one, write_checkpoint

from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart
from vlmserve.server.prompts.processor import Processor

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[2] / "data"
LIMIT = 100_000
QUESTION = "What is in this image?"
SYSTEM = "You are a helpful assistant."
# As Meta's own code encodes them.
WITH_IMAGE = [
    128000, 128006, 882, 128007, 271, 128256, 3923, 374, 304, 420, 2217, 30,
    128009, 128006, 78191, 128007, 271,
]  # fmt: skip
WITHOUT_IMAGE = [one for one in WITH_IMAGE if one != 128256]
SYSTEM_TURN = [128006, 9125, 128007, 271, 2675, 527, 264, 11190, 18328, 13, 128009]
SPECIAL_IDS = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008,
    "<|eot_id|>": 128009, "<|python_tag|>": 128010, "<|image|>": 128256,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder like the published checkpoint's: its tokenizer and its chat template."""
    # Here, so that no other test waits for transformers to be imported.
    from support.published_tokenizer import write_published

    return write_published(write_checkpoint(tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def processor(published):
    return Processor.from_folder(published, now=lambda: datetime.datetime(2024, 7, 26))


@pytest.fixture(scope="module")
def in_metas_format(tmp_path_factory, published):
    folder = write_checkpoint(tmp_path_factory.mktemp("meta"), template=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((published / name).read_bytes())
    return Processor.from_folder(folder)


def turn(role, *texts, images=0):
    pictures = tuple(ImagePart(f"https://host/{i}.png", "image") for i in range(images))
    return Message(role, (*pictures, *map(TextPart, texts)))


def test_the_special_tokens_have_the_published_ids(processor):
    assert {name: processor.tokenizer.token_to_id(name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert processor.last_token_id == 128256
    assert set(processor.eos_token_ids) >= {128001, 128008, 128009}


def test_a_turn_with_an_image_has_metas_17_ids(processor, in_metas_format):
    for one in (processor, in_metas_format):
        assert one.prepare([turn("user", QUESTION, images=1)], LIMIT).token_ids == WITH_IMAGE


def test_a_turn_without_an_image_has_metas_16_ids(in_metas_format):
    assert in_metas_format.prepare([turn("user", QUESTION)], LIMIT).token_ids == WITHOUT_IMAGE


def test_a_system_message_and_an_image_have_metas_28_ids(processor, in_metas_format):
    messages = [turn("system", SYSTEM), turn("user", QUESTION, images=1)]
    expected = [128000, *SYSTEM_TURN, *WITH_IMAGE[1:]]
    assert len(expected) == 28
    for one in (processor, in_metas_format):
        assert one.prepare(messages, LIMIT).token_ids == expected


def test_the_published_template_without_an_image_has_41_ids_at_a_fixed_date(processor):
    assert len(processor.prepare([turn("user", QUESTION)], LIMIT).token_ids) == 41


def test_text_that_spells_special_tokens_stays_text(processor, in_metas_format):
    spelled = "".join(SPECIAL_IDS)
    for one in (processor, in_metas_format):
        ids = one.prepare([turn("user", spelled, images=1)], LIMIT).token_ids
        plain = one.prepare([turn("user", "x", images=1)], LIMIT).token_ids
        special = set(SPECIAL_IDS.values())
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert spelled in one.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_documented_request_counts_the_documented_17_prompt_tokens(published, processor):
    answer = "This image shows a boardwalk in a field of tall grass."
    script = lambda request: list(tokens_one_by_one(processor.tokenizer, answer))  # noqa: E731
    body = json.loads((DATA / "chat.request.json").read_text())
    sample = json.loads((DATA / "chat.response.json").read_text())

    async def ask():
        engine = ScriptedEngine(script)
        async with client_of(published, engine) as client:
            response = await client.post("/v1/chat/completions", json=body)
        return response.json(), engine.requests[0]

    found, request = asyncio.run(ask())
    assert request.prompt_token_ids == WITH_IMAGE
    assert found["usage"]["prompt_tokens"] == sample["usage"]["prompt_tokens"] == 17
    assert found["choices"][0]["message"]["content"] == answer
