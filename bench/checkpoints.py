"""Builds random Mllama checkpoints of known layouts: for tests, and for measuring speed.

Owns the layouts. Such a model answers nonsense, deterministically: its gates are 0.7, so that
vision and every cross-attention layer count, and its seed fixes every weight. The tokenizer, the
chat template and the processor's files come from the bundled model, so that MllamaProcessor and
the server load the folder.

    python bench/checkpoints.py m100 --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration

VOCAB_SIZE = 768
GATE = 0.7
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sides(hidden: int, heads: int, inner: int, layers: int, **more: Any) -> dict[str, Any]:
    """A text decoder's or a vision encoder's sizes."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    name = "num_attention_heads" if "cross_attention_layers" in more else "attention_heads"
    return {**sizes, name: heads, **more}


_TINY_VISION = _sides(
    *(32, 2, 48, 3), num_global_layers=1, image_size=28, intermediate_layers_indices=[1, 2]
)
_TINY_TEXT = _sides(
    *(64, 4, 96, 6),
    cross_attention_layers=[1, 3, 4],
    num_key_value_heads=2,
    max_position_embeddings=16384,
    initializer_range=0.1,
)

# name -> what differs from the tiny layout, text first
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": ({}, {}),
    "cross-first": ({"cross_attention_layers": [0, 2, 5]}, {}),
    "cross-last-two": ({"cross_attention_layers": [4, 5]}, {}),
    "cross-in-a-row": ({"cross_attention_layers": [1, 2, 3]}, {}),
    "one-kv-head": ({"num_key_value_heads": 1, "rope_parameters": _PLAIN_ROPE}, {}),
    "all-kv-heads": ({"num_key_value_heads": 4}, {"intermediate_layers_indices": [0, 1, 2]}),
    # its vision takes many times as long as a short prompt's text
    "vision-heavy": (
        _sides(256, 4, 512, 6, cross_attention_layers=[1, 3]),
        _sides(
            *(512, 8, 2048, 12),
            num_global_layers=4,
            image_size=112,
            intermediate_layers_indices=[3, 7],
        ),
    ),
    # few layers, wide enough that their weights are nearly all of its memory
    "wide": (
        _sides(1024, 8, 4096, 4, cross_attention_layers=[1], num_key_value_heads=4),
        {},
    ),
    "m100": (
        _sides(
            *(768, 12, 2048, 14),
            cross_attention_layers=[3, 7, 11],
            num_key_value_heads=4,
            initializer_range=0.05,
        ),
        _sides(256, 4, 1024, 6, image_size=112, intermediate_layers_indices=[1, 3]),
    ),
}


# Llama-3.2-11B-Vision's sizes, as its config.json has them
PUBLISHED = "11b"


def layout(name: str) -> MllamaConfig:
    """The configuration of a named layout, vocabulary 768 and image token 768, or of "11b"."""
    if name == PUBLISHED:
        return _published()
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is unknown: use one of {', '.join(LAYOUTS)}")
    text, vision = LAYOUTS[name]
    vision = {"patch_size": 14, "max_num_tiles": 4} | _TINY_VISION | vision
    num_taps = len(vision["intermediate_layers_indices"])
    vision["vision_output_dim"] = vision["hidden_size"] * (1 + num_taps)
    text = {"vocab_size": VOCAB_SIZE, "rope_parameters": _LLAMA3_ROPE} | _TINY_TEXT | text
    vision["initializer_range"] = text["initializer_range"]
    ids = {"bos_token_id": 752, "eos_token_id": [753, 760, 761], "pad_token_id": 756}
    return MllamaConfig(vision_config=vision, text_config=text | ids, image_token_index=VOCAB_SIZE)


def _published() -> MllamaConfig:
    cross = {"cross_attention_layers": list(range(3, 40, 5)), "num_key_value_heads": 8}
    text = _sides(4096, 32, 14_336, 40, **cross) | {"rope_parameters": _LLAMA3_ROPE}
    text |= {"vocab_size": 128_256, "max_position_embeddings": 131_072, "pad_token_id": 128_004}
    vision = {"image_size": 560, "max_num_tiles": 4, "patch_size": 14, "vision_output_dim": 7680}
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=128_256)


def random_model(config: MllamaConfig, seed: int = 0) -> MllamaForConditionalGeneration:
    """A model of that configuration with random weights, float32, all gates at 0.7."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(GATE)
            elif name.endswith(("layernorm.weight", "norm.weight")):
                parameter.uniform_(0.5, 1.5)  # ones would hide a norm left out
        # a logit of 0 is never the greatest: every greedy answer is as long as it was asked for
        text_config: Any = config.text_config
        model.lm_head.weight[text_config.eos_token_id] = 0.0
    return model


def build(
    name_or_config: str | MllamaConfig,
    folder: str | Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_processor: bool = True,
) -> Path:
    """A checkpoint folder with random weights; the same bytes for the same arguments.

    with_processor: the tokenizer's and processor's files too; without, only what the engine reads.
    """
    folder = Path(folder)
    config = layout(name_or_config) if isinstance(name_or_config, str) else name_or_config
    model: Any = random_model(config, seed)
    model.to(dtype).save_pretrained(folder)
    text_config: Any = config.text_config
    GenerationConfig(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=text_config.pad_token_id,
    ).save_pretrained(folder)
    if with_processor:
        from vlmserve.models.bundled.dataset.tokenizer import build_tokenizer

        build_tokenizer().save_pretrained(folder)
    vision_config: Any = config.vision_config
    _write_processor(folder, vision_config.image_size, vision_config.max_num_tiles)
    return folder


def _write_processor(folder: Path, tile_size: int, max_image_tiles: int) -> None:
    """preprocessor_config.json as the published checkpoint has it, but for the sizes."""
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": max_image_tiles,
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": tile_size, "width": tile_size},
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=list(LAYOUTS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    folder = build(options.layout, options.out, options.seed, dtype)
    print(f"wrote {options.layout} ({options.dtype}, seed {options.seed}) to {folder}")


if __name__ == "__main__":
    main()
