"""Grades a checkpoint on an exam without a server: transformers with its fixes, in float32.

An answer is right if each of its ids and the closing <|eot_id|> is the most likely id after the
right ids before it, which means that greedy decoding generates it. So one forward pass grades many
questions, and also gives the answer's probability at temperature 1.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import MllamaForConditionalGeneration, PreTrainedTokenizerFast

from ...decoder.mllama_fixes import mend
from ..dataset.config import image_processor
from ..dataset.data import IGNORE, Row, Rows, encode_row, pad_rows
from ..dataset.tokenizer import Encoder, Message
from .exam import Item, Result


@dataclass(slots=True)
class Grader:
    """A checkpoint's model and its encoder of prompts."""

    model: MllamaForConditionalGeneration
    encoder: Encoder

    @classmethod
    def load(cls, checkpoint: Path) -> Grader:
        """The checkpoint in this folder, in float32, with transformers' fixes."""
        model = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        return cls(mend(model.eval()), Encoder(tokenizer))

    def grade(self, items: list[Item], batch_size: int = 64) -> list[Result]:
        """A result for each item, in order."""
        results: list[Result] = []
        for i in range(0, len(items), batch_size):
            results += self._grade_batch(items[i : i + batch_size])
        return results

    @torch.inference_mode()
    def _grade_batch(self, items: list[Item]) -> list[Result]:
        rows = pad_rows([row_of(item, self.encoder) for item in items])
        images, tile_mask = self._process(items)
        sees_tiles = rows.sees[..., None] * tile_mask[:, None]
        logits = self.model(
            input_ids=rows.input_ids, cross_attention_mask=sees_tiles, use_cache=False, **images
        ).logits
        is_right, probability = _marks(logits, rows)
        marks = zip(items, is_right.tolist(), probability.tolist(), strict=True)
        return [Result(item, bool(right), probability=p) for item, right, p in marks]

    @staticmethod
    def _process(items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        """The items' pictures as model inputs, blank for an item without a picture; and which tiles
        may be seen, [items, 1, 4]."""
        blank = Image.new("RGB", (56, 56))
        pictures: Any = [[_decoded(item) if item.picture is not None else blank] for item in items]
        inputs = image_processor()(images=pictures, return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return {name: inputs[name] for name in names}, inputs["aspect_ratio_mask"]


def row_of(item: Item, encoder: Encoder) -> Row:
    """The item with its right answer as a conversation; only the last answer counts."""
    messages = [Message("system", item.system)] if item.system else []
    for index, (text, answer) in enumerate(item.turns):
        num_images = int(item.scene is not None and index == 0)
        messages.append(Message("user", text, num_images, item.is_image_first))
        messages.append(Message("assistant", answer))
    row = encode_row(encoder, messages, pictures=[0])
    num_before = len(row.targets) - len(encoder.text_ids(item.answer)) - 1
    return replace(row, targets=[IGNORE] * num_before + row.targets[num_before:])


def _decoded(item: Item) -> Image.Image:
    """The item's picture, decoded from its file."""
    return Image.open(io.BytesIO(item.picture_bytes())).convert("RGB")


def _marks(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Whether each row's learned ids are all the most likely, and their joint probability."""
    is_learned = rows.targets != IGNORE
    is_right = (logits.argmax(-1) == rows.targets) | ~is_learned
    loss = functional.cross_entropy(
        logits.transpose(1, 2).float(), rows.targets, ignore_index=IGNORE, reduction="none"
    )
    return is_right.all(1), torch.exp(-loss.sum(1))
