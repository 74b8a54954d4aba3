"""Turns a conversation into token ids and image spans.

Owns the tokenizer of an HTTP worker, and the rule that only the template makes special tokens.
Reads the checkpoint's files itself, because transformers would import torch. Knows nothing of
pixels, HTTP or the engine.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...models.batch import ImageSpan
from ...models.eos_tokens import configured_end_ids, end_token_ids
from .chat_template import BEGIN_OF_TEXT, IMAGE, ChatTemplate, Clock, TemplateRefusedError
from .conversation import (
    ImagePart,
    Message,
    Tool,
    ToolFormat,
    with_images_in_front,
    with_joined_texts,
)
from .meta_format import render_as_meta, with_tools_in_system
from .placeholders import RenderedPiece

logger = logging.getLogger(__name__)

END_OF_MESSAGE = "<|eom_id|>"
PYTHON_TAG = "<|python_tag|>"

SLICE_CHARS = 65_536
SLICE_SLACK = 16


class PromptTooLongError(Exception):
    """The prompt has more tokens than the limit, which by default leaves room for an answer.

    num_tokens: as text, because the count may have stopped early.
    """

    def __init__(self, num_tokens: str, max_tokens: int) -> None:
        super().__init__(
            f"prompt has {num_tokens} tokens; max_model_len is {max_tokens + 1:,} and one token is"
            " kept for the answer: shorten it or start with a larger --max-model-len"
        )
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


@dataclass(slots=True, frozen=True)
class PreparedPrompt:
    """A prompt in the engine's form: one `<|image|>` token per image.

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
        self.image_id = tokenizer.token_to_id(IMAGE)
        self.last_token_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_token_ids = end_token_ids(tokenizer, eos_token_ids)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._mark_ids = {token.content: token_id for token_id, token in added.items()}
        self._marks = _any_of(self._mark_ids)
        self.end_of_message_id = tokenizer.token_to_id(END_OF_MESSAGE)
        self.python_tag_id = tokenizer.token_to_id(PYTHON_TAG)

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
        return cls(tokenizer, template, configured_end_ids(folder), image_position)

    def prepare(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        tools: Sequence[Tool] = (),
        tool_format: ToolFormat = "json",
        *,
        add_generation_prompt: bool = True,
    ) -> PreparedPrompt:
        """The prompt's token ids, its image spans, and its images in prompt order.

        max_tokens: the limit of the prompt. tools, tool_format: the tools in the prompt and their
        format. add_generation_prompt: the prompt ends with the header of the answer.
        Raises PromptTooLongError.
        """
        arranged = [with_joined_texts(self._arrange(message)) for message in messages]
        if tools and tool_format == "json" and any(message.images for message in arranged):
            arranged, tools = with_tools_in_system(arranged, tools), ()
        self._check_size(_texts_of(arranged, tools), max_tokens)
        pieces = self._render(arranged, tools, tool_format, add_generation_prompt)
        token_ids = self._encode(pieces)
        if len(token_ids) > max_tokens:
            raise PromptTooLongError(f"{len(token_ids):,}", max_tokens)
        images = [image for message in arranged for image in message.images]
        return PreparedPrompt(token_ids, image_spans(token_ids, self.image_id), images)

    def _arrange(self, message: Message) -> Message:
        return with_images_in_front(message) if self._image_position == "front" else message

    def prepare_text(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True
    ) -> list[int]:
        """The token ids of a plain text; names of special tokens in it are text.

        add_special_tokens: `<|begin_of_text|>` comes first.
        Raises PromptTooLongError.
        """
        self._check_size([text], max_tokens)
        token_ids = _encode(self._plain, text)
        if add_special_tokens and self._bos_id is not None:
            token_ids.insert(0, self._bos_id)
        if len(token_ids) > max_tokens:
            raise PromptTooLongError(f"{len(token_ids):,}", max_tokens)
        return token_ids

    def text_of(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, in one call, during which other threads run."""
        texts: list[str] = self.tokenizer.decode_batch(
            [list(token_ids)], skip_special_tokens=skip_special_tokens
        )
        return texts[0]

    def names_of(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens' names in the vocabulary, such as `Ġimage`."""
        names = (self.tokenizer.id_to_token(token_id) for token_id in token_ids)
        return [name or "" for name in names]

    def _check_size(self, texts: Iterable[str], max_tokens: int) -> None:
        """Reject texts that are far too long before they are tokenized completely (minutes).

        All texts count as one. A cut inside a word adds a few tokens, so each slice counts a few
        less.
        """
        num_tokens = 0
        for text in _slices(texts):
            num_tokens += max(0, len(_encode(self._plain, text)) - SLICE_SLACK)
            if num_tokens > max_tokens:
                raise PromptTooLongError(f"over {num_tokens:,}", max_tokens)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        tool_format: ToolFormat,
        add_generation_prompt: bool,
    ) -> list[RenderedPiece]:
        """By the checkpoint's template; in Meta's format if the template cannot."""
        by_meta = functools.partial(
            render_as_meta,
            messages,
            tools,
            tool_format,
            add_generation_prompt=add_generation_prompt,
        )
        if self._template is None or (tools and tool_format != "json"):
            return by_meta()
        try:
            return self._template.render(
                messages, tools, add_generation_prompt=add_generation_prompt
            )
        except TemplateRefusedError as error:
            logger.debug("chat template refused, using Meta's format: %s", error)
            return by_meta()

    def _encode(self, pieces: Sequence[RenderedPiece]) -> list[int]:
        """The template's special tokens by name, each text between them as one; one BOS first.

        So the tokens are those of the whole rendering, wherever a user's text starts.
        """
        token_ids: list[int] = []
        text = ""
        for part, is_mark in self._parts(pieces):
            if not is_mark:
                text += part
                continue
            token_ids += _encode(self._plain, text)
            token_ids.append(self._mark_ids[part])
            text = ""
        token_ids += _encode(self._plain, text)
        if self._bos_id is not None and token_ids[:1] != [self._bos_id]:
            token_ids.insert(0, self._bos_id)
        return token_ids

    def _parts(self, pieces: Sequence[RenderedPiece]) -> Iterator[tuple[str, bool]]:
        """The rendering split at the template's special tokens; True for such a token."""
        for piece in pieces:
            if not piece.is_template:
                yield piece.text, False
                continue
            for number, part in enumerate(self._marks.split(piece.text)):
                yield part, number % 2 == 1


def _texts_of(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[str]:
    """Every text of the client in a prompt, about as long as in the prompt."""
    for message in messages:
        yield message.text.strip()
        yield from (call.arguments_text for call in message.tool_calls)
    yield from (json.dumps(tool.definition, ensure_ascii=False) for tool in tools)


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """All texts joined, in slices of at most SLICE_CHARS; none if one slice is enough."""
    waiting: list[str] = []
    num_waiting = 0
    is_long = False
    for text in texts:
        for start in range(0, len(text), SLICE_CHARS):
            piece = text[start : start + SLICE_CHARS]
            if num_waiting + len(piece) > SLICE_CHARS:
                yield "".join(waiting)
                waiting, num_waiting, is_long = [], 0, True
            waiting.append(piece)
            num_waiting += len(piece)
    if is_long:
        yield "".join(waiting)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the names of added tokens; of several matches the longest."""
    longest_first = sorted(names, key=len, reverse=True)
    # Without names: a pattern that never matches.
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


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
    if not text:
        return []
    # As a batch: only that lets other threads run meanwhile, the event loop's among them.
    token_ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return token_ids


def _plain_twin(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for users' text, in which no token is special."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    added = plain.get_added_tokens_decoder().values()
    # A token that was added but not marked special would still be recognised.
    plain.add_special_tokens([AddedToken(t.content, special=True) for t in added if not t.special])
    plain.encode_special_tokens = True
    return plain


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty without such a file."""
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
