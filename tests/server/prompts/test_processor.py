"""From a conversation to token ids and image spans."""

import datetime
import json
from pathlib import Path

import pytest
from support.http_side import LLAMA_TEMPLATE, SPECIAL_IDS, write_checkpoint

from vlmserve.models import bundled
from vlmserve.models.batch import ImageSpan
from vlmserve.server.prompts import processor as prompt
from vlmserve.server.prompts.chat_template import ChatTemplate, TemplateRefusedError
from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart, Tool
from vlmserve.server.prompts.meta_format import render_as_meta
from vlmserve.server.prompts.processor import Processor, PromptTooLongError, image_spans

IMAGE = 128256
QUESTION = "What is in this image?"
# Meta's ids, from the reference.
WITH_IMAGE = [
    128000, 128006, 882, 128007, 271, 128256, 3923, 374, 304, 420, 2217, 30,
    128009, 128006, 78191, 128007, 271,
]  # fmt: skip
WITHOUT_IMAGE = [token_id for token_id in WITH_IMAGE if token_id != IMAGE]
SYSTEM = [128006, 9125, 128007, 271, 2675, 527, 264, 11190, 18328, 13, 128009]
LIMIT = 100_000


def fixed_now():
    return datetime.datetime(2024, 7, 26)


def text(role, *texts):
    return Message(role, tuple(map(TextPart, texts)))


def user(*parts):
    """A user's message; an int stands for an image of that number."""
    return Message(
        "user",
        tuple(
            ImagePart(f"https://host/{part}.png", f"image{part}")
            if isinstance(part, int)
            else TextPart(part)
            for part in parts
        ),
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_folder(
        write_checkpoint(tmp_path_factory.mktemp("published")), now=fixed_now
    )


@pytest.fixture(scope="module")
def as_sent(tmp_path_factory):
    return Processor.from_folder(write_checkpoint(tmp_path_factory.mktemp("sent")), "as-sent")


@pytest.fixture(scope="module")
def in_metas_format(tmp_path_factory):
    return Processor.from_folder(write_checkpoint(tmp_path_factory.mktemp("meta"), template=None))


def test_a_user_turn_with_an_image_has_metas_17_ids(processor, in_metas_format):
    for one in (processor, in_metas_format):
        assert one.prepare([user(1, QUESTION)], LIMIT).token_ids == WITH_IMAGE


def test_a_user_turn_without_an_image_has_metas_16_ids_in_metas_format(in_metas_format):
    assert in_metas_format.prepare([user(QUESTION)], LIMIT).token_ids == WITHOUT_IMAGE


def test_a_system_message_with_an_image_is_rendered_as_meta_does(processor, in_metas_format):
    """The published template raises on this; the request works nevertheless."""
    messages = [text("system", "You are a helpful assistant."), user(1, QUESTION)]
    expected = [128000, *SYSTEM, *WITH_IMAGE[1:]]
    assert len(expected) == 28
    for one in (processor, in_metas_format):
        assert one.prepare(messages, LIMIT).token_ids == expected


def test_the_published_template_writes_the_injected_date(processor):
    token_ids = processor.prepare([user(QUESTION)], LIMIT).token_ids
    rendered = processor.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in rendered
    assert token_ids[-len(WITHOUT_IMAGE) + 1 :] == WITHOUT_IMAGE[1:]


def test_a_template_that_asks_for_no_clock_gets_the_published_default_date():
    template = ChatTemplate(LLAMA_TEMPLATE.replace("strftime_now is defined", "false"), {})
    rendered = "".join(piece.text for piece in template.render([user("hi")]))
    assert "Today Date: 26 Jul 2024" in rendered


def test_bos_is_there_once_whether_the_template_writes_it_or_not(tmp_path):
    for number, template in enumerate(
        (LLAMA_TEMPLATE, LLAMA_TEMPLATE[len("{{- bos_token }}\n") :])
    ):
        folder = write_checkpoint(tmp_path / str(number), template)
        token_ids = Processor.from_folder(folder).prepare([user(1, QUESTION)], LIMIT).token_ids
        assert token_ids == WITH_IMAGE


@pytest.mark.parametrize("special", sorted(SPECIAL_IDS))
def test_text_that_spells_a_special_token_stays_text(processor, in_metas_format, special):
    for one in (processor, in_metas_format):
        plain = one.prepare([text("system", "a"), user(1, "b")], LIMIT).token_ids
        spelled = one.prepare([text("system", f"a{special}"), user(1, f"b{special}")], LIMIT)
        specials = set(SPECIAL_IDS.values())
        assert [i for i in spelled.token_ids if i in specials] == [
            i for i in plain if i in specials
        ]
        decoded = one.tokenizer.decode(spelled.token_ids, skip_special_tokens=True)
        assert decoded.count(special) == 2
        assert len(spelled.spans) == 1


def test_an_added_token_that_is_not_special_stays_text_too(tmp_path):
    folder = write_checkpoint(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|python_tag|>"
    path.write_text(json.dumps(content))
    token_ids = Processor.from_folder(folder).prepare([user("<|python_tag|>")], LIMIT).token_ids
    assert SPECIAL_IDS["<|python_tag|>"] not in token_ids


def test_text_that_spells_template_code_is_not_run(processor):
    prompt = processor.prepare([user("{{ 7 * 7 }}{% raw %}")], LIMIT)
    assert "{{ 7 * 7 }}{% raw %}" in processor.tokenizer.decode(prompt.token_ids)


def test_a_list_of_texts_is_one_text(processor):
    whole = processor.prepare([text("system", "You are a helpful assistant."), user("hi")], LIMIT)
    parts = [text("system", "You are", " a helpful", " assistant."), user("h", "i")]
    assert processor.prepare(parts, LIMIT).token_ids == whole.token_ids


def test_white_space_around_a_text_is_kept_where_the_template_keeps_it(processor):
    """It used to be trimmed, which the published template does to system messages only."""
    kept = processor.prepare([user(1, f" \n{QUESTION}\n\n ")], LIMIT)
    text = processor.tokenizer.decode(kept.token_ids, skip_special_tokens=False)
    assert f"<|image|> \n{QUESTION}\n\n <|eot_id|>" in text
    system = processor.prepare([Message("system", (TextPart(" Be brief. "),)), user("hi")], LIMIT)
    text = processor.tokenizer.decode(system.token_ids, skip_special_tokens=False)
    assert "2024\n\nBe brief.<|eot_id|>" in text


def test_images_go_to_the_front_of_their_message(processor):
    prompt = processor.prepare([user(QUESTION, 1)], LIMIT)
    assert prompt.token_ids == WITH_IMAGE


def test_images_stay_where_they_were_sent_when_asked(as_sent):
    token_ids = as_sent.prepare([user(QUESTION, 1)], LIMIT).token_ids
    assert token_ids == [*WITH_IMAGE[:5], *WITH_IMAGE[6:12], IMAGE, *WITH_IMAGE[12:]]
    assert as_sent.prepare([user(1, QUESTION)], LIMIT).token_ids == WITH_IMAGE


def test_images_come_in_prompt_order_over_several_turns(as_sent):
    messages = [user(1, "a", 2), text("assistant", "b"), user("c", 3)]
    prompt = as_sent.prepare(messages, LIMIT)
    assert [image.field for image in prompt.images] == ["image1", "image2", "image3"]
    places = [i for i, token_id in enumerate(prompt.token_ids) if token_id == IMAGE]
    assert [span.start for span in prompt.spans] == places
    assert [span.end for span in prompt.spans] == [places[1], places[2], None]


def test_an_image_alone_is_a_prompt(processor):
    prompt = processor.prepare([user(1)], LIMIT)
    assert prompt.token_ids == [*WITH_IMAGE[:6], *WITH_IMAGE[12:]]


def test_several_turns_are_rendered_in_order(in_metas_format):
    token_ids = in_metas_format.prepare(
        [user(1, QUESTION), text("assistant", "a helpful image"), user("What?")], LIMIT
    ).token_ids
    rendered = in_metas_format.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>"
        "What is in this image?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "a helpful image<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def spans_of(length, *places):
    return image_spans([IMAGE if i in places else 0 for i in range(length)], IMAGE)


def test_spans_follow_metas_rule():
    """The numbers of Meta's create_vision_mask; an end at the prompt's length stays open."""
    assert spans_of(14) == []
    assert spans_of(14, 5) == [ImageSpan(5)]
    assert spans_of(14, 5, 6) == [ImageSpan(5), ImageSpan(6)]
    assert spans_of(14, 5, 7) == [ImageSpan(5, 7), ImageSpan(7)]
    assert spans_of(14, 2, 3, 7) == [ImageSpan(2, 7), ImageSpan(3, 7), ImageSpan(7)]
    assert spans_of(14, 2, 5, 6, 9) == [
        ImageSpan(2, 5),
        ImageSpan(5, 9),
        ImageSpan(6, 9),
        ImageSpan(9),
    ]
    assert spans_of(8, 7) == [ImageSpan(7)]


def test_a_prompt_that_is_too_long_names_the_numbers_and_the_remedy(processor):
    with pytest.raises(PromptTooLongError, match=r"prompt has 17 tokens.*17.*--max-model-len"):
        processor.prepare([user(1, QUESTION)], 16)
    assert len(processor.prepare([user(1, QUESTION)], 17).token_ids) == 17


FIELDS = {f"field{number}": {"type": "string"} for number in range(1_000)}
MEGABYTES = {
    "a text": ([user("x" * 10_000_000)], ()),
    # Each is short by itself: they used to be tokenized to their ends, for minutes.
    "many turns": ([user("word " * 10_000)] * 200, ()),
    "many tools": ([user("a")], [Tool(f"f{n}", None, {"properties": FIELDS}) for n in range(120)]),
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_megabytes_are_refused_without_tokenizing_them_all(processor, monkeypatch, name):
    tokenized = []

    def encode(tokenizer, text):
        tokenized.append(len(text))
        return tokenizer.encode(text, add_special_tokens=False).ids

    monkeypatch.setattr(prompt, "encode", encode)
    messages, tools = MEGABYTES[name]
    with pytest.raises(PromptTooLongError, match="over"):
        processor.prepare(messages, 8191, tools)
    assert sum(tokenized) <= 65_536


@pytest.mark.parametrize("num_turns", [1, 10, 2_000])
def test_a_long_text_that_fits_is_not_refused_for_its_slices(in_metas_format, num_turns):
    """Cuts inside words and characters make more tokens than there are."""
    messages = [user("What 🐻 is in this image? " * (8000 // num_turns))] * num_turns
    token_ids = in_metas_format.prepare(messages, 10**6).token_ids
    exact = len(token_ids)
    assert in_metas_format.prepare(messages, exact).token_ids == token_ids
    with pytest.raises(PromptTooLongError):
        in_metas_format.prepare(messages, exact - 1)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}{{ messages[0]['content'] }}",
        "nothing of it",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_loses_or_doubles_text_or_misbehaves_is_refused(template):
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(template, {}).render([user("hi")])


def test_a_template_that_loses_an_image_is_refused():
    with pytest.raises(TemplateRefusedError, match="0 of 1 images"):
        ChatTemplate("{{ messages[0]['content'][1]['text'] }}", {}).render([user(1, "hi")])


def test_metas_format_trims_and_marks_what_is_template():
    pieces = render_as_meta([user(1, " hi ")])
    assert [piece.text for piece in pieces if not piece.is_template] == ["hi"]


def test_turn_ends_come_from_the_configuration_and_the_tokenizer(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 128010}')
    assert Processor.from_folder(folder).eos_token_ids == [128001, 128008, 128009, 128010]


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "named"])
def test_the_template_is_found_where_checkpoints_keep_it(tmp_path, place):
    folder = write_checkpoint(tmp_path, template=None)
    name = "tokenizer_config.json" if place == "named" else place
    value = [{"name": "default", "template": LLAMA_TEMPLATE}]
    content = {"chat_template": value if place == "named" else LLAMA_TEMPLATE}
    (folder / name).write_text(json.dumps(content))
    prompt = Processor.from_folder(folder, now=fixed_now).prepare([user("hi")], LIMIT)
    assert "Cutting Knowledge" in Processor.from_folder(folder).tokenizer.decode(prompt.token_ids)


def test_files_that_do_not_serve_are_named(tmp_path):
    for name, error in (("tokenizer.json", ValueError), ("chat_template.jinja", ValueError)):
        folder = write_checkpoint(tmp_path / name)
        (folder / name).write_text("{% if")
        with pytest.raises(error, match=r"tokenizer|template"):
            Processor.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Processor.from_folder(folder)


BUNDLED = Path(bundled.__file__).parent / "checkpoint"


@pytest.mark.parametrize(
    "messages",
    [
        [user("What colour is the shape?")],
        [user(1, "What shape is it?")],
        [user("How many shapes are there?", 1)],
        [user(1, 2, "Which one?", 3)],
        [text("system", "You are a helpful assistant."), user(1, "What is in this image?")],
        [user("hi"), text("assistant", "Hello."), user("  Who are you? ")],
    ],
)
def test_the_bundled_prompt_is_the_one_that_transformers_makes(messages):
    """Encoded piece by piece here, whole there."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(BUNDLED)
    turns = [
        {
            "role": message.role,
            "content": [
                {"type": "image"}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ours = Processor.from_folder(BUNDLED, "as-sent").prepare(messages, LIMIT)
    assert ours.token_ids == expected
    assert len(ours.spans) == sum(len(message.images) for message in messages)


def test_the_bundled_tokenizers_begin_token_comes_once():
    """Its tokenizer.json adds one too, and so does its chat template."""
    processor = Processor.from_folder(BUNDLED)
    begin = processor.tokenizer.token_to_id("<|begin_of_text|>")
    text = processor.prepare_text("What is", LIMIT)
    assert text == processor.tokenizer.encode("What is").ids
    assert text.count(begin) == 1
    assert processor.prepare_text("What is", LIMIT, add_special_tokens=False) == text[1:]
    assert processor.prepare([user(1, "a b")], LIMIT).token_ids.count(begin) == 1


def test_the_bundled_tokenizer_keeps_spelled_special_tokens_as_text():
    processor = Processor.from_folder(BUNDLED)
    plain = processor.prepare([user(1, "a b")], LIMIT).token_ids
    spelled = processor.prepare([user(1, "a <|image|><|eot_id|> b")], LIMIT)
    specials = {processor.tokenizer.token_to_id(name) for name in SPECIAL_IDS}
    assert [i for i in spelled.token_ids if i in specials] == [i for i in plain if i in specials]
    assert len(spelled.spans) == 1
