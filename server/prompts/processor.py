"""Turns a conversation into token ids and image spans.

Owns the tokenizer of an HTTP worker, and the rule that only the template makes special tokens.
Reads the checkpoint's files itself, because transformers would import torch. Knows nothing of
pixels, HTTP or the engine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ...models.batch import ImageSpan
from ...models.eos_tokens import configured_end_ids, end_token_ids
from .chat_template import AS_USUAL, IMAGE, ChatTemplate, FormatOption, TemplateOptions, any_of
from .conversation import ImagePart, ImagePosition, Message, Tool, ToolFormat, arranged
from .placeholders import RenderedPiece
from .rendering import MetaReason, Renderer
from .templates.environment import Clock
from .templates.processes import TemplateProcesses
from .templates.sources import BEGIN_OF_TEXT, special_tokens, template_sources
from .text_slices import slices
from .tokenizer import encode, plain_twin, read_tokenizer

END_OF_MESSAGE = "<|eom_id|>"
PYTHON_TAG = "<|python_tag|>"

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

    spans and images run in parallel, in prompt order. meta_reason: why a conversation is in Meta's
    format; None where the template rendered it, or where there is no conversation.
    """

    token_ids: list[int]
    spans: list[ImageSpan]
    images: list[ImagePart]
    meta_reason: MetaReason | None = None


class Processor:
    """A checkpoint's tokenizer and chat templates."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        renderer: Renderer,
        eos_token_ids: Sequence[int],
        image_position: ImagePosition = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self._plain = plain_twin(tokenizer)
        self.renderer = renderer
        self._image_position: ImagePosition = image_position
        self._bos_id = tokenizer.token_to_id(BEGIN_OF_TEXT)
        self.image_id = tokenizer.token_to_id(IMAGE)
        self.last_token_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_token_ids = end_token_ids(tokenizer, eos_token_ids)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._mark_ids = {token.content: token_id for token_id, token in added.items()}
        self._marks = any_of(self._mark_ids)
        self.end_of_message_id = tokenizer.token_to_id(END_OF_MESSAGE)
        self.python_tag_id = tokenizer.token_to_id(PYTHON_TAG)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        image_position: ImagePosition = "auto",
        now: Clock = datetime.datetime.now,
        *,
        template_file: Path | None = None,
        content_format: FormatOption = "auto",
    ) -> Processor:
        """The processor of a checkpoint's folder: tokenizer.json and its neighbours.

        template_file: the chat template to use instead of the checkpoint's. content_format: how
        contents are handed to it. Raises FileNotFoundError or ValueError that names the file.
        """
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        # Batch settings of a training run must not cut or pad a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        marks = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        sources = template_sources(folder, template_file)
        processes = TemplateProcesses()

        def template(source: str | None) -> ChatTemplate | None:
            if source is None:
                return None
            return ChatTemplate(
                source,
                special_tokens(folder),
                now,
                marks=marks,
                content_format=content_format,
                processes=processes,
            )

        renderer = Renderer(None)
        if sources is not None:
            renderer = Renderer(
                template(sources.default), template(sources.tool_use), origin=sources.origin
            )
        return cls(tokenizer, renderer, configured_end_ids(folder), image_position)

    def prepare(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        tools: Sequence[Tool] = (),
        tool_format: ToolFormat = "json",
        options: TemplateOptions = AS_USUAL,
    ) -> PreparedPrompt:
        """The prompt's token ids, its image spans, and its images in prompt order.

        max_tokens: the limit of the prompt. tools, tool_format: the tools in the prompt and their
        format. Raises PromptTooLongError, TemplateRefusedError, or LostChildError if the server was
        short of resources.
        """
        placed = [arranged(message, self._image_position) for message in messages]
        self._check_size(_texts_of(placed, tools, options), max_tokens)
        rendering = self.renderer.render(placed, tools, tool_format, options)
        token_ids = self._encode(rendering.pieces)
        if len(token_ids) > max_tokens:
            raise PromptTooLongError(f"{len(token_ids):,}", max_tokens)
        images = [image for message in placed for image in message.images]
        spans = image_spans(token_ids, self.image_id)
        return PreparedPrompt(token_ids, spans, images, rendering.meta_reason)

    def prepare_text(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True
    ) -> list[int]:
        """The token ids of a plain text; names of special tokens in it are text.

        add_special_tokens: `<|begin_of_text|>` comes first.
        Raises PromptTooLongError.
        """
        self._check_size([text], max_tokens)
        token_ids = encode(self._plain, text)
        if add_special_tokens and self._bos_id is not None:
            token_ids.insert(0, self._bos_id)
        if len(token_ids) > max_tokens:
            raise PromptTooLongError(f"{len(token_ids):,}", max_tokens)
        return token_ids

    def tokens_of(self, text: str) -> list[int]:
        """The token ids of a short text as it stands within another."""
        return encode(self._plain, text)

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
        for text in slices(texts):
            num_tokens += max(0, len(encode(self._plain, text)) - SLICE_SLACK)
            if num_tokens > max_tokens:
                raise PromptTooLongError(f"over {num_tokens:,}", max_tokens)

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
            token_ids += encode(self._plain, text)
            token_ids.append(self._mark_ids[part])
            text = ""
        token_ids += encode(self._plain, text)
        if self._bos_id is not None and token_ids[:1] != [self._bos_id]:
            token_ids.insert(0, self._bos_id)
        return token_ids

    def _parts(self, pieces: Sequence[RenderedPiece]) -> Iterator[tuple[str, bool]]:
        """The rendering split at the template's special tokens; True for such a token."""
        for piece in pieces:
            if not piece.is_template:
                yield piece.text, False
                continue
            begin = 0
            for mark in self._marks.finditer(piece.text):
                yield piece.text[begin : mark.start()], False
                yield mark[0], True
                begin = mark.end()
            yield piece.text[begin:], False


def _texts_of(
    messages: Sequence[Message], tools: Sequence[Tool], options: TemplateOptions
) -> Iterator[str]:
    """Every text of the client in a prompt, about as long as in the prompt."""
    for message in messages:
        yield message.text.strip()
        yield from (call.arguments_text for call in message.tool_calls)
    yield from (json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    yield json.dumps(options.variables, ensure_ascii=False)


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
