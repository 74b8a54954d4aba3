"""The bundled checkpoint loads offline, its tokenizer keeps Llama 3's facts, and it answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor, MllamaForConditionalGeneration, MllamaProcessor

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.dataset.questions import TYPES, Question, describe, questions
from vlmserve.models.bundled.exam.client import Client, ClientError, messages_of
from vlmserve.models.bundled.exam.exam import Item, Result, exam, score, scores, table
from vlmserve.models.bundled.pictures import (
    MAX_SHAPES,
    Scene,
    Shape,
    draw,
    encode,
    random_scene,
    random_size,
)

IMAGE_ID = 768


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return AutoProcessor.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """What the checkpoint answers, in float32, about fresh pictures of one and two shapes."""
    from vlmserve.models.bundled.exam.grading import Grader

    return Grader.load(CHECKPOINT).grade(exam(8, seed=5, shapes=(1, 2)))


def two_shapes() -> Scene:
    circle = Shape("circle", "red", (255, 0, 0), 0.3, 0.5, 0.25)
    star = Shape("star", "blue", (0, 0, 255), 0.75, 0.5, 0.2)
    return Scene(200, 150, "white", (255, 255, 255), (star, circle))


# --- pictures and questions ---


def test_same_seed_draws_the_same_picture() -> None:
    one, other = (encode(draw(random_scene(np.random.default_rng(3)))) for _ in range(2))
    assert one == other


def test_scene_has_as_many_shapes_as_asked_and_none_overlap() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        scene = random_scene(rng, index % (MAX_SHAPES + 1), random_size(rng))
        assert len(scene.shapes) == index % (MAX_SHAPES + 1)
        side = min(scene.width, scene.height)
        for i, a in enumerate(scene.shapes):
            assert a.colour != scene.background
            for b in scene.shapes[:i]:
                apart = np.hypot((a.x - b.x) * scene.width, (a.y - b.y) * scene.height)
                assert apart > (a.radius + b.radius) * side


def test_too_many_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_shapes is 5"):
        random_scene(np.random.default_rng(0), 5)


def test_random_sizes_stay_within_two_to_one() -> None:
    rng = np.random.default_rng(1)
    sizes = [random_size(rng) for _ in range(300)]
    assert all(100 <= side <= 600 for size in sizes for side in size)
    assert max(max(size) / min(size) for size in sizes) <= 2.01


def test_picture_shows_the_colours_of_its_scene() -> None:
    image = draw(two_shapes())
    assert image.size == (200, 150)
    assert image.getpixel((60, 75)) == (255, 0, 0)
    assert image.getpixel((150, 75)) == (0, 0, 255)
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_description_names_shapes_in_alphabetical_order() -> None:
    assert describe(two_shapes()) == "There is a red circle and a blue star on a white background."


def test_description_counts_shapes_that_look_the_same() -> None:
    scene = two_shapes()
    twice = Scene(200, 150, "white", (255, 255, 255), (scene.shapes[1],) * 2)
    assert describe(twice) == "There are two red circles on a white background."


def test_answers_follow_from_the_scene_whatever_the_wording() -> None:
    asked = [questions(two_shapes(), np.random.default_rng(seed)) for seed in range(20)]
    answers = {(question.type, question.answer) for each in asked for question in each}
    assert {answer for kind, answer in answers if kind == "count"} == {"There are two shapes."}
    assert {answer for kind, answer in answers if kind == "background"} == {
        "The background is white."
    }
    assert {answer for kind, answer in answers if kind == "colour"} == {
        "The circle is red.",
        "The star is blue.",
    }
    assert {kind for kind, _ in answers} == set(TYPES)


def test_yes_and_no_are_about_as_frequent() -> None:
    rng = np.random.default_rng(2)
    asked = [question for _ in range(400) for question in questions(random_scene(rng), rng)]
    for question_type in ("is_there", "is_it"):
        answers = [question.answer for question in asked if question.type == question_type]
        share = sum(answer.startswith("Yes") for answer in answers) / len(answers)
        assert 0.4 < share < 0.6


def test_request_carries_the_image_where_the_item_says() -> None:
    item = next(item for item in exam(4, shapes=(1,)) if item.picture is not None)
    parts = messages_of(replace(item, system=None, history=()))[0]["content"]
    kinds = ["image_url", "text"] if item.is_image_first else ["text", "image_url"]
    assert [part["type"] for part in parts] == kinds


def test_request_of_a_later_turn_carries_the_image_in_its_first_message() -> None:
    scene = two_shapes()
    asked = Question("count", "How many shapes are there?", "There are two shapes.")
    item = Item("colour", "What colour is the star?", "The star is blue.", scene, draw(scene))
    messages = messages_of(replace(item, system="Be brief.", history=(asked,)))
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"][1]["text"] == asked.text
    assert messages[2]["content"] == asked.answer
    assert messages[3]["content"] == item.text


@pytest.fixture
def recorded() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a server that always answers "two", and the bodies it was sent."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._reply({"choices": [{"message": {"content": "two"}}]})

        def _reply(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            """Keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        server.shutdown()


@pytest.mark.parametrize(("temperature", "sent"), [(0.0, {"temperature": 0.0}), (None, {})])
def test_client_sends_no_sampling_field_it_was_not_told_to(
    recorded: tuple[str, list[dict[str, Any]]],
    temperature: float | None,
    sent: dict[str, float],
) -> None:
    url, bodies = recorded
    items = [Item("count", "How many?", answer) for answer in ("two", "one")]
    results = Client(url, temperature).put(items, concurrency=2)
    assert [result.is_right for result in results] == [True, False]
    message = {"role": "user", "content": "How many?"}
    assert bodies == [{"model": "tiny", "messages": [message], **sent}] * 2


def test_client_names_the_server_that_it_cannot_reach() -> None:
    with pytest.raises(ClientError, match=r"http://127.0.0.1:9/v1 cannot be reached"):
        Client("http://127.0.0.1:9/v1").put([Item("count", "How many?", "two")])


def test_score_stands_beside_the_most_frequent_answer() -> None:
    items = [Item("count", "How many?", answer) for answer in ("two", "two", "one", "two")]
    counted = score([Result(item, item.answer == "one") for item in items], "count")
    assert (counted.right, counted.baseline) == (0.25, 0.75)


def test_table_has_a_column_for_each_way_of_asking() -> None:
    items = [Item("small_talk", "Hi!", "Hello!"), Item("small_talk", "Bye!", "Goodbye!")]
    columns = {
        name: scores([Result(item, is_right) for item in items])
        for name, is_right in {"greedy": True, "sampled": False}.items()
    }
    assert table(columns).splitlines()[0::2] == [
        "| questions | number | greedy | sampled | most frequent answer |",
        "| small_talk | 2 | 100.0% | 0.0% | 50.0% |",
    ]


# --- the checkpoint ---


def test_checkpoint_loads_offline() -> None:
    model = MllamaForConditionalGeneration.from_pretrained(CHECKPOINT, local_files_only=True)
    assert model.config.text_config.vocab_size == IMAGE_ID
    assert model.generation_config.eos_token_id == [753, 760, 761]


def test_checkpoint_is_small_enough_for_a_repository() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 12_000_000


def test_configuration_uses_what_the_published_model_uses() -> None:
    text = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
    assert len(text["cross_attention_layers"]) >= 2
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["max_position_embeddings"] >= 8192
    assert text["rope_parameters"]["rope_type"] == "llama3"


def test_image_token_follows_the_text_vocabulary(processor: MllamaProcessor) -> None:
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == IMAGE_ID


def test_each_digit_is_one_token(processor: MllamaProcessor) -> None:
    ids = processor.tokenizer.encode("2048", add_special_tokens=False)
    assert [processor.tokenizer.decode([token_id]) for token_id in ids] == ["2", "0", "4", "8"]


@pytest.mark.parametrize("text", ["Grüße, 東京! 🦙", "  two  spaces\n\n\ttab", "the <|eot|> end"])
def test_any_text_survives_encoding(processor: MllamaProcessor, text: str) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_a_text_starts_with_one_begin_token_as_in_the_published_model(
    processor: MllamaProcessor,
) -> None:
    """Clients that count tokens by this tokenizer used to count one less than the server."""
    tokenizer = processor.tokenizer
    plain = tokenizer.encode("Hi!", add_special_tokens=False)
    begin = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert tokenizer.encode("Hi!") == [begin, *plain]
    assert tokenizer("Hi!", "Hi!").input_ids == [begin, *plain] * 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi!"}])["input_ids"]
    assert chat.count(begin) == 1


def test_documented_prompt_has_seventeen_tokens_as_in_the_published_model(
    processor: MllamaProcessor,
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    assert len(ids) == 17
    assert ids[5] == IMAGE_ID


def test_template_takes_a_system_message_beside_an_image(processor: MllamaProcessor) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi! "}, {"type": "image"}]},
    ]
    assert processor.apply_chat_template(messages) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|image|><|eot_id|>"
    )


@pytest.mark.parametrize("question_type", ["colour", "shape", "background", "count"])
def test_fresh_pictures_are_answered_rightly(results: list[Result], question_type: str) -> None:
    group = [result for result in results if result.item.type == question_type]
    assert score(group, question_type).right >= 0.9


@pytest.mark.parametrize("question_type", ["small_talk", "no_picture"])
def test_questions_without_a_picture_are_answered_rightly(
    results: list[Result], question_type: str
) -> None:
    group = [result for result in results if result.item.type == question_type]
    assert score(group, question_type).right >= 0.9


@pytest.mark.slow
def test_short_training_lowers_the_loss_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmserve.models.bundled.training.train"]
    command += ["--minutes", "1.1", "--vision-share", "0.4", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    losses = [line["loss"]["colour"] for line in lines]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]
    model = MllamaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert model.config.image_token_index == IMAGE_ID
