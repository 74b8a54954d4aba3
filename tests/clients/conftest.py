"""What every client's checks share: the two servers, and a picture with what is true of it.

Runs in a client's own environment, which knows nothing of vlmserve: `test_real_clients.py`
names the servers by environment variables.
"""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SHAPES = {
    "What is in this image?": "There is a red circle and a blue triangle on a white background.",
    "How many shapes are there?": "There are two shapes.",
    "What colour is the triangle?": "The triangle is blue.",
    "What colour is the background?": "The background is white.",
    "Is there a square?": "No, there is no square.",
}


@dataclass(frozen=True)
class Picture:
    """A picture in base64, and what is to be said of it."""

    base64: str
    answers: dict[str, str]

    @property
    def url(self) -> str:
        return f"data:image/png;base64,{self.base64}"


def picture_of(path: Path, answers: dict[str, str]) -> Picture:
    return Picture(base64.b64encode(path.read_bytes()).decode(), answers)


@pytest.fixture(scope="session")
def shapes() -> Picture:
    """A red circle and a blue triangle on white."""
    return picture_of(EXAMPLES / "shapes.png", SHAPES)


@pytest.fixture(scope="session")
def other() -> Picture:
    """A picture that was drawn for this run, with one answer."""
    question, answer = os.environ["OTHER_QUESTION"], os.environ["OTHER_ANSWER"]
    return picture_of(Path(os.environ["OTHER_PICTURE"]), {question: answer})


@pytest.fixture(scope="session")
def url() -> str:
    """The bundled model's server."""
    return os.environ["SERVER_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["SERVER_MODEL"]


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """The folder of the bundled model's tokenizer, for clients that count tokens themselves."""
    return ROOT / "models" / "bundled" / "checkpoint"


@pytest.fixture(scope="session")
def scripted_url() -> str:
    """A server whose engine answers by the words of the question; its key is `secret`."""
    return os.environ["SCRIPTED_URL"]


@pytest.fixture(scope="session")
def scripted_model() -> str:
    return os.environ["SCRIPTED_MODEL"]
