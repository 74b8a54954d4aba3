"""The bundled model's sizes: its configuration and its checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from .tokenizer import IMAGE_TOKEN, SPECIAL_IDS, VOCAB_SIZE, build_tokenizer

TILE_SIZE = 56
PATCH_SIZE = 14
MAX_TILES = 4
HIDDEN = 128
TAPS = (1, 3)
FEATURES = HIDDEN * (1 + len(TAPS))
PATCHES_PER_TILE = (TILE_SIZE // PATCH_SIZE) ** 2
# as in the published checkpoint, from CLIP
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BOS_ID = SPECIAL_IDS["<|begin_of_text|>"]
PAD_ID = SPECIAL_IDS["<|finetune_right_pad_id|>"]
# the tokens that end a turn
EOS_IDS = tuple(SPECIAL_IDS[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id"))


def model_config() -> MllamaConfig:
    """The configuration, in the published checkpoint's proportions where possible."""
    vision = {
        "hidden_size": HIDDEN,
        "attention_heads": 4,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_global_layers": 1,
        "image_size": TILE_SIZE,
        "patch_size": PATCH_SIZE,
        "max_num_tiles": MAX_TILES,
        "intermediate_layers_indices": list(TAPS),
        "vision_output_dim": FEATURES,
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "cross_attention_layers": [1, 3, 4],
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": BOS_ID,
        "eos_token_id": list(EOS_IDS),
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": False,
    }
    return MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL_IDS[IMAGE_TOKEN]
    )


def image_processor() -> MllamaImageProcessorPil:
    """The published checkpoint's image processor, with this model's tiles."""
    return MllamaImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        max_image_tiles=MAX_TILES,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def save_checkpoint(model: MllamaForConditionalGeneration, folder: Path) -> None:
    """Write everything that `from_pretrained` reads; the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    image_processor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_class_as_published(folder / "tokenizer_config.json")
    config = model_config()
    config.architectures = ["MllamaForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    generation = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=list(EOS_IDS), pad_token_id=PAD_ID
    )
    generation.save_pretrained(folder)
    weights = {name: t.detach().bfloat16().contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _name_class_as_published(file: Path) -> None:
    """Set the tokenizer's class as in published checkpoints; older releases know no other."""
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2) + "\n")
