"""The API's document: generated from the types that validate, complete, and true."""

import json
from pathlib import Path

import pytest

from vlmserve.server.routes import samples

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("chat.request", samples.CHAT_REQUEST),
        ("chat.response", samples.CHAT_COMPLETION),
        ("llama_stack.request", samples.STACK_REQUEST),
        ("llama_stack.response", samples.STACK_COMPLETION),
    ],
)
def test_the_documents_examples_are_the_documented_samples(name, sample):
    documented = json.loads((DATA / f"{name}.json").read_text())
    assert json.dumps(sample) == json.dumps(documented)


def test_the_example_of_models_is_the_documented_one_but_for_its_random_id():
    documented = json.loads((DATA / "models.response.json").read_text())
    permission = documented["data"][0]["permission"][0]
    permission["id"] = samples.MODEL_LIST["data"][0]["permission"][0]["id"]
    assert json.dumps(samples.MODEL_LIST) == json.dumps(documented)
