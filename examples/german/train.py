"""Train the example adapter: the bundled model answers in German.

    pip install peft
    python examples/german/train.py --steps 1600 --out examples/german

A LoRA adapter of rank 8 on the decoder's linear layers, except the keys and values of
cross-attention: the picture is seen as before, so its cached blocks are shared with the base model.
PEFT saves float32; this saves bfloat16, half the bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from answers import german
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration, PreTrainedTokenizerFast

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.dataset.data import (
    Batch,
    Conversations,
    Mixture,
    Row,
    conversation,
    encode_row,
)
from vlmserve.models.bundled.dataset.tokenizer import Encoder, Message
from vlmserve.models.bundled.exam.exam import Item, exam
from vlmserve.models.bundled.exam.grading import Grader
from vlmserve.models.bundled.training.train import answer_loss
from vlmserve.models.decoder.mllama_fixes import mend

TARGETS = (
    r".*language_model.*(self_attn\.(q|k|v|o)_proj|cross_attn\.(q|o)_proj|mlp\.(gate|up|down)_proj)"
)
BASE = "vlmserve-tiny-vision"
WARM_UP_STEPS = 50


class GermanConversations(Conversations):
    """The training conversations, with all answers in German."""

    def _row(self, rng: np.random.Generator, scenes: list, index: int) -> Row:
        messages = [translated(message) for message in conversation(rng, scenes[index])]
        return encode_row(self._encoder, messages, [index])


def translated(message: Message) -> Message:
    """The message, in German if it is an answer."""
    if message.role != "assistant":
        return message
    return Message("assistant", german(message.text))


def train(options: argparse.Namespace) -> MllamaForConditionalGeneration:
    """The trained model with its adapter, in float32."""
    torch.manual_seed(options.seed)
    model = mend(MllamaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32))
    settings = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS)
    tuned = get_peft_model(model, settings)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(CHECKPOINT))
    data = GermanConversations(encoder, Mixture(options.batch_size, max_shapes=3), options.seed)
    batches = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options.steps)
        loss = loss_of(model, next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == options.steps:
            write({"step": step, "loss": round(loss.item(), 4)})
        if step and step % 200 == 0:
            save(tuned, options.out)
    save(tuned, options.out)
    return model


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: a short warm-up, then a cosine to 5 %."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


def loss_of(model: MllamaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The mean cross entropy over all answer tokens."""
    pictures = batch.pictures
    with torch.no_grad():
        features = model.model.vision_model(
            pictures.pixel_values, pictures.aspect_ratio_ids, pictures.aspect_ratio_mask
        ).last_hidden_state
    return answer_loss(model, features, pictures.aspect_ratio_mask, batch.buckets)


def save(tuned: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does, its weights in bfloat16 and its base by name."""
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card
    file = folder / "adapter_model.safetensors"
    weights = {name: one.bfloat16() for name, one in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": BASE}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def grade(model: MllamaForConditionalGeneration, num_pictures: int) -> float:
    """The share of held-out questions with exactly the right answer in German."""
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(CHECKPOINT))
    items = [in_german(item) for item in exam(num_pictures) if not item.history]
    results = Grader(model.eval(), encoder).grade(items)
    return sum(result.is_right for result in results) / len(results)


def in_german(item: Item) -> Item:
    """The item with its answer in German."""
    return replace(item, answer=german(item.answer))


def write(line: dict[str, float]) -> None:
    """Write one JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Train, save, and print the share of right answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="pictures of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures", type=int, default=20, help="of the exam, each number of shapes"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(options)
    write({"right": round(grade(model, options.pictures), 4)})


if __name__ == "__main__":
    main()
