"""The bundled model's tokenizer: a byte-level BPE of 768 ids with Llama 3's special tokens.

Owns the vocabulary, the chat template and the encoding of a conversation. Ids 0 to 751 are text
(every byte has an id, each digit is one token). 752 to 767 are Llama 3's first special tokens in
the published order. `<|image|>` is 768, the text vocabulary's size, as in the published checkpoint:
the model can read it but never generates it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from ..pictures import random_scene
from .questions import questions
from .small_talk import NO_PICTURE, SYSTEM, TALK

VOCAB_SIZE = 768
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
        *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
        *("eom_id", "eot_id", "python_tag"),
        *(f"reserved_special_token_{number}" for number in range(3, 8)),
    )
)
IMAGE_TOKEN = "<|image|>"
NUM_TEXT_IDS = VOCAB_SIZE - len(SPECIAL_TOKENS)
SPECIAL_IDS = {token: NUM_TEXT_IDS + i for i, token in enumerate((*SPECIAL_TOKENS, IMAGE_TOKEN))}

# Llama 3's pattern, except that digits stand alone
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3.2's form of messages, tools and calls, for every mix of them.
CHAT_TEMPLATE = r"""{{- bos_token -}}
{%- set ns = namespace(has_images=false) -%}
{%- for message in messages if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
        {%- set ns.has_images = true -%}
    {%- endfor -%}
{%- endfor -%}
{%- set task = 'Given the following functions, please respond with a JSON for a function call with '
    + 'its proper arguments that best answers the given prompt.\n\nRespond in the format {"name": '
    + 'function name, "parameters": dictionary of argument name and its value}.Do not use '
    + 'variables.\n\n' -%}
{%- if tools -%}
    {#- Tools stand in the system message beside images, else in the first user message. -#}
    {%- set place = 'system' if ns.has_images else 'user' -%}
    {%- if not ns.has_images and messages and messages[0]['role'] == 'system' -%}
        {{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
        {{- messages[0]['content'] | trim + '<|eot_id|>' -}}
        {%- set messages = messages[1:] -%}
    {%- endif -%}
    {%- set is_there = messages and messages[0]['role'] == place -%}
    {%- if not is_there and place == 'user' -%}
        {{- raise_exception('Tools need a message of a user at the start of the conversation.') -}}
    {%- endif -%}
    {{- '<|start_header_id|>' + place + '<|end_header_id|>\n\n' + task -}}
    {%- for tool in tools -%}
        {{- tool | tojson(indent=4) + '\n\n' -}}
    {%- endfor -%}
    {%- if is_there -%}
        {{- messages[0]['content'] | trim -}}
        {%- set messages = messages[1:] -%}
    {%- endif -%}
    {{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- part['text'] | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message['tool_calls'] -%}
        {%- if not loop.first -%}
            {{- '; ' -}}
        {%- elif message['content'] -%}
            {{- '\n' -}}
        {%- endif -%}
        {{- '{"name": "' + call.function.name + '", "parameters": ' -}}
        {{- call.function.arguments | tojson + '}' -}}
    {%- endfor -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

# words outside the questions, so that they are not encoded byte by byte
_MORE_WORDS = """
user assistant system The first picture. The second picture. In both pictures. In the first image
the shapes are the same. Between the pictures there are two images and more than one photo. Which
picture shows it? I would like to know what you think about this and that, because it was not there
before. There has been some time for all of them to make one of these. Each of us will come here,
when they go out with him or her, to be or not to be. Can this have been only what people say?
Left, right, top, bottom, middle, small, large, big, bigger, smaller, same, different, other.
"""


def build_tokenizer(num_scenes: int = 600, seed: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on the wordings of `num_scenes` scenes; the same for the same seed."""
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TEXT_IDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(num_scenes, seed), trainer)
    if backend.get_vocab_size() != NUM_TEXT_IDS:
        raise ValueError(f"only {backend.get_vocab_size()} text ids: the corpus is too small")
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_IDS]
    )
    # As the published one: a text starts with the begin token, unless add_special_tokens is false.
    begin = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0",
        pair=f"{begin}:0 $A:0 {begin}:1 $B:1",
        special_tokens=[(begin, SPECIAL_IDS[begin])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=16384,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _corpus(num_scenes: int, seed: int) -> list[str]:
    """Questions and answers of random scenes, and all fixed wordings."""
    rng = np.random.default_rng(seed)
    lines = [*_MORE_WORDS.strip().splitlines() * 5, *SYSTEM, *[NO_PICTURE] * 50]
    # one token for each part of a message's header
    lines += ["\n\n", "user", "assistant", "system"] * 300
    for answer, wordings in TALK.items():
        lines += [answer] * 20 + list(wordings) * 4
    for _ in range(num_scenes):
        for question in questions(random_scene(rng), rng):
            lines += [question.text, question.answer]
    return lines


@dataclass(frozen=True, slots=True)
class Message:
    """One message; num_images images stand before the text, or after it."""

    role: str
    text: str
    num_images: int = 0
    is_image_first: bool = True


@dataclass(slots=True)
class Encoded:
    """A conversation as ids; `is_learned` is 1 at the ids of answers and of their <|eot_id|>."""

    ids: list[int] = field(default_factory=list)
    is_learned: list[int] = field(default_factory=list)

    def add(self, ids: list[int], is_learned: bool = False) -> None:
        """Append ids; is_learned: of all of them."""
        self.ids += ids
        self.is_learned += [int(is_learned)] * len(ids)


class Encoder:
    """Encodes conversations as the chat template renders them, text pieces cached.

    Text never becomes a special id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._pieces: dict[str, list[int]] = {}

    def encode(self, messages: list[Message], *, with_generation_prompt: bool = False) -> Encoded:
        """The ids of the conversation, <|begin_of_text|> first."""
        encoded = Encoded()
        encoded.add([SPECIAL_IDS["<|begin_of_text|>"]])
        for message in messages:
            encoded.add(self._header(message.role))
            images = [SPECIAL_IDS[IMAGE_TOKEN]] * message.num_images
            text = self.text_ids(message.text.strip())
            body = images + text if message.is_image_first else text + images
            encoded.add([*body, SPECIAL_IDS["<|eot_id|>"]], is_learned=message.role == "assistant")
        if with_generation_prompt:
            encoded.add(self._header("assistant"))
        return encoded

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text."""
        if text not in self._pieces:
            if len(self._pieces) > 200_000:
                self._pieces.clear()
            self._pieces[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._pieces[text]

    def _header(self, role: str) -> list[int]:
        start, end = SPECIAL_IDS["<|start_header_id|>"], SPECIAL_IDS["<|end_header_id|>"]
        return [start, *self.text_ids(role), end, *self.text_ids("\n\n")]
