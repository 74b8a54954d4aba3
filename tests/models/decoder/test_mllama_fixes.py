"""The mended transformers model does what Meta's implementation does, and the unmended does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from vlmserve.models.decoder.mllama_fixes import mend, mend_cross_attention, mend_vision

IMAGE_ID = 64
TAPS = [1, 2]


def tiny_config() -> MllamaConfig:
    """Two tiles' worth of vision, four decoder layers of which two are cross-attention layers."""
    return MllamaConfig(
        vision_config={
            "hidden_size": 32, "attention_heads": 2, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_global_layers": 1, "image_size": 28, "patch_size": 14,
            "max_num_tiles": 4, "intermediate_layers_indices": TAPS, "vision_output_dim": 96,
        },
        text_config={
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "num_hidden_layers": 4, "cross_attention_layers": [1, 2],
            "vocab_size": IMAGE_ID, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=IMAGE_ID,
    )  # fmt: skip


@pytest.fixture
def model() -> MllamaForConditionalGeneration:
    """An unmended model in float32 with all gates at 0.7, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.7)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model


def image_inputs(seed: int, num_images: int = 1) -> dict[str, Tensor]:
    """Random pixels of `num_images` rows with one image of 2 x 1 tiles each."""
    generator = torch.Generator().manual_seed(seed)
    tile_mask = torch.tensor([[[1, 1, 0, 0]]]).expand(num_images, 1, 4)
    return {
        "pixel_values": torch.randn(num_images, 1, 4, 3, 28, 28, generator=generator),
        "aspect_ratio_ids": torch.full((num_images, 1), 5),
        "aspect_ratio_mask": tile_mask,
    }


def prompt_inputs(image_position: int | None, length: int = 8) -> dict[str, Tensor]:
    """Ids [1, length] with the image token at its position, and the mask Meta's code builds."""
    input_ids = torch.arange(3, 3 + length)[None]
    mask = torch.zeros(1, length, 1, 4, dtype=torch.int64)
    if image_position is not None:
        input_ids[0, image_position] = IMAGE_ID
        mask[0, image_position:, 0, :2] = 1
    return {"input_ids": input_ids, "cross_attention_mask": mask}


@torch.no_grad()
def logits(model: MllamaForConditionalGeneration, **inputs: Any) -> Tensor:
    return model(**inputs, use_cache=False).logits


def test_token_before_the_first_image_is_unaffected_by_the_image(
    model: MllamaForConditionalGeneration,
) -> None:
    prompt = prompt_inputs(image_position=4)
    mend_cross_attention(model)
    one, other = (logits(model, **prompt, **image_inputs(seed)) for seed in (1, 2))
    torch.testing.assert_close(one[:, :4], other[:, :4], atol=0.0, rtol=0.0)
    assert (one[:, 4:] - other[:, 4:]).abs().max() > 1e-2


def test_token_before_the_first_image_is_as_in_a_text_only_request(
    model: MllamaForConditionalGeneration,
) -> None:
    prompt = prompt_inputs(image_position=4)
    mend(model)
    with_image = logits(model, **prompt, **image_inputs(1))
    alone = logits(model, input_ids=prompt["input_ids"][:, :4])
    torch.testing.assert_close(with_image[:, :4], alone, atol=1e-5, rtol=0.0)


def test_unmended_model_lets_a_token_before_the_image_see_it(
    model: MllamaForConditionalGeneration,
) -> None:
    """The departure that the mend is for (transformers issue 39379)."""
    prompt = prompt_inputs(image_position=4)
    one, other = (logits(model, **prompt, **image_inputs(seed)) for seed in (1, 2))
    assert (one[:, :4] - other[:, :4]).abs().max() > 1e-2


def test_text_only_row_has_the_same_logits_alone_and_beside_an_image_row(
    model: MllamaForConditionalGeneration,
) -> None:
    text, picture = prompt_inputs(None), prompt_inputs(2)
    both = {name: torch.cat([text[name], picture[name]]) for name in text}
    images = image_inputs(3, num_images=2)
    alone = logits(model, input_ids=text["input_ids"])
    assert (logits(model, **both, **images)[:1] - alone).abs().max() > 1e-2
    mend_cross_attention(model)
    torch.testing.assert_close(logits(model, **both, **images)[:1], alone, atol=1e-5, rtol=0.0)


@torch.no_grad()
def taps_by_hand(vision: MllamaVisionModel, images: dict[str, Tensor]) -> Tensor:
    """The inputs of the blocks in TAPS, interleaved: [batch, tiles, patches, hidden * taps]."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or [*kwargs.values()])[0].clone()),
            with_kwargs=True,
        )
        for block in vision.transformer.layers
    ]
    vision(**images)
    for hook in hooks:
        hook.remove()
    taps = torch.stack([seen[index] for index in TAPS], dim=-1)
    num_tiles, num_patches = 4, vision.num_patches
    return taps.reshape(len(taps), num_tiles, -1, 32 * len(TAPS))[:, :, :num_patches]


def test_vision_taps_are_the_inputs_of_their_blocks(model: MllamaForConditionalGeneration) -> None:
    vision, images = model.model.vision_model, image_inputs(4)
    expected = taps_by_hand(vision, images)
    with torch.no_grad():
        unmended = vision(**images).last_hidden_state[:, 0, :, :, 32:]
        mend_vision(model)
        mended = vision(**images).last_hidden_state[:, 0, :, :, 32:]
    assert (unmended - expected).abs().max() > 1e-2
    torch.testing.assert_close(mended, expected, atol=0.0, rtol=0.0)


def test_vision_mend_alone_leaves_cross_attention_as_it_is(
    model: MllamaForConditionalGeneration,
) -> None:
    mend_vision(model)
    prompt = prompt_inputs(image_position=4)
    one, other = (logits(model, **prompt, **image_inputs(seed)) for seed in (1, 2))
    assert (one[:, :4] - other[:, :4]).abs().max() > 1e-2


def test_mending_twice_is_mending_once(model: MllamaForConditionalGeneration) -> None:
    inputs = prompt_inputs(3) | image_inputs(5)
    once = logits(mend(model), **inputs)
    torch.testing.assert_close(logits(mend(model), **inputs), once, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generating_with_a_cache_equals_generating_without(
    model: MllamaForConditionalGeneration, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    mend(model)
    inputs = prompt_inputs(3) | image_inputs(6)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **settings, use_cache=True)
    uncached = model.generate(**inputs, **settings, use_cache=False)
    assert cached.tolist() == uncached.tolist()


def test_gradients_pass_through_the_mended_model(model: MllamaForConditionalGeneration) -> None:
    mend(model).train()
    inputs = prompt_inputs(3) | image_inputs(7)
    model(**inputs, labels=inputs["input_ids"].clamp(max=IMAGE_ID - 1)).loss.backward()
    cross_attention = model.model.language_model.layers[1].cross_attn
    for parameter in (cross_attention.k_proj.weight, model.model.vision_model.class_embedding):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
