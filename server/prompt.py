"""Turns a conversation into token ids and image spans.

Owns the tokenizer of an HTTP worker and the rule that special tokens come only
from the template. Reads the checkpoint's files itself: transformers would bring
torch. Knows nothing of pixels, of HTTP or of the engine.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..models.batch import ImageSpan
from .conversation import ImagePart, Message, with_images_in_front, with_joined_texts
from .template import (
    BEGIN_OF_TEXT,
    IMAGE,
    ChatTemplate,
    Clock,
    RenderedPiece,
    TemplateRefusedError,
    render_as_meta,
)

logger = logging.getLogger(__name__)

TURN_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
END_OF_MESSAGE = "<|eom_id|>"

SLICE_CHARS = 65_536
SLICE_SLACK = 16


class PromptTooLongError(Exception):
    """The prompt leaves no room for an answer in the model's context."""


@dataclass(slots=True, frozen=True)
class PreparedPrompt:
    """A prompt as the engine takes it: one `<|image|>` token an image.

    spans and images run in parallel, in prompt order.
    """

    token_ids: list[int]
    spans: list[ImageSpan]
    images: list[ImagePart]


class Processor:
    """A checkpoint's tokenizer and chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        eos_token_ids: Sequence[int],
        image_position: str = "front",
    ) -> None:
        self.tokenizer = tokenizer
        self._plain = _plain_twin(tokenizer)
        self._template = template
        self._image_position = image_position
        self._bos_id = tokenizer.token_to_id(BEGIN_OF_TEXT)
        self._image_id = tokenizer.token_to_id(IMAGE)
        self.eos_token_ids = sorted(set(eos_token_ids) | set(_ids_of(tokenizer, TURN_ENDS)))
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.end_of_message_id = tokenizer.token_to_id(END_OF_MESSAGE)

    @classmethod
    def from_folder(
        cls, folder: Path, image_position: str = "front", now: Clock = datetime.datetime.now
    ) -> Processor:
        """The processor of a checkpoint's folder: tokenizer.json and its neighbours.

        Raises FileNotFoundError or ValueError that names the file.
        """
        config = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        template = ChatTemplate(source, _special_tokens(config), now) if source else None
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        # Batch settings of a training run must not cut or pad a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, template, _configured_eos_ids(folder), image_position)

    def prepare(self, messages: Sequence[Message], max_tokens: int) -> PreparedPrompt:
        """The prompt's token ids, its image spans, and its images in prompt order.

        max_tokens: how long the prompt may be.
        Raises PromptTooLongError.
        """
        arranged = [with_joined_texts(self._arrange(message)) for message in messages]
        self._check_size(arranged, max_tokens)
        token_ids = self._encode(self._render(arranged))
        if len(token_ids) > max_tokens:
            raise PromptTooLongError(_too_long(f"{len(token_ids):,}", max_tokens))
        images = [image for message in arranged for image in message.images]
        return PreparedPrompt(token_ids, image_spans(token_ids, self._image_id), images)

    def _arrange(self, message: Message) -> Message:
        return with_images_in_front(message) if self._image_position == "front" else message

    def _check_size(self, messages: Sequence[Message], max_tokens: int) -> None:
        """Refuse a hopeless text before it is tokenized to its end, which may be seconds away.

        A cut inside a word adds a few tokens, so each slice counts for a few less.
        """
        num_tokens = 0
        for message in messages:
            text = message.text.strip()
            if len(text) <= SLICE_CHARS:
                continue
            for begin in range(0, len(text), SLICE_CHARS):
                num_slice = len(_encode(self._plain, text[begin : begin + SLICE_CHARS]))
                num_tokens += max(0, num_slice - SLICE_SLACK)
                if num_tokens > max_tokens:
                    raise PromptTooLongError(_too_long(f"over {num_tokens:,}", max_tokens))

    def _render(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """By the checkpoint's template, and where that cannot, in Meta's format."""
        if self._template is None:
            return render_as_meta(messages)
        try:
            return self._template.render(messages)
        except TemplateRefusedError as error:
            logger.debug("chat template refused, using Meta's format: %s", error)
            return render_as_meta(messages)

    def _encode(self, pieces: Sequence[RenderedPiece]) -> list[int]:
        """Each piece by itself, as Meta's ChatFormat does; one BOS in front."""
        token_ids: list[int] = []
        for piece in pieces:
            tokenizer = self.tokenizer if piece.is_template else self._plain
            token_ids += _encode(tokenizer, piece.text)
        if self._bos_id is not None and token_ids[:1] != [self._bos_id]:
            token_ids.insert(0, self._bos_id)
        return token_ids


def image_spans(token_ids: Sequence[int], image_id: int | None) -> list[ImageSpan]:
    """Which positions may see which image, one span an image, in prompt order.

    An image is seen from its token on until the next image that does not stand
    right beside it; adjacent images share their end; the last one's is open.
    Source: Meta's create_vision_mask (llama-models, llama3/reference_impl).
    """
    places = [place for place, token_id in enumerate(token_ids) if token_id == image_id]
    spans: list[ImageSpan] = []
    end: int | None = None
    following: int | None = None
    for place in reversed(places):
        if following is not None and following != place + 1:
            end = following
        spans.append(ImageSpan(place, end))
        following = place
    return spans[::-1]


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not a whole checkpoint")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The tokenizers library raises nothing more special.
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # As a batch: only that lets other threads run meanwhile, the event loop's among them.
    token_ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return token_ids


def _plain_twin(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for users' text, to which no token is special."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    added = plain.get_added_tokens_decoder().values()
    # A token that was added but not marked special would still be recognised.
    plain.add_special_tokens([AddedToken(t.content, special=True) for t in added if not t.special])
    plain.encode_special_tokens = True
    return plain


def _too_long(num_tokens: str, max_tokens: int) -> str:
    return (
        f"prompt has {num_tokens} tokens; max_model_len is {max_tokens + 1:,} and one token is"
        " kept for the answer: shorten it or start with a larger --max-model-len"
    )


def _ids_of(tokenizer: Tokenizer, names: Sequence[str]) -> list[int]:
    ids = (tokenizer.token_to_id(name) for name in names)
    return [token_id for token_id in ids if token_id is not None]


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content


def _template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The chat template's text from the places where checkpoints keep it."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text("utf-8")
    for config in (_read_json(folder / "chat_template.json"), tokenizer_config):
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if isinstance(template, str):
            return template
    return None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """bos_token and its like by name; some checkpoints write them as objects."""
    tokens: dict[str, str] = {"bos_token": BEGIN_OF_TEXT}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = tokenizer_config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _configured_eos_ids(folder: Path) -> list[int]:
    """The end-of-turn ids that the checkpoint's generation_config names."""
    value = _read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
