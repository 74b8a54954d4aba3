"""The vision model without its mask: equal to transformers with it, for every layout of tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import NUM_TILES, TINY_LAYOUTS, image, loaded, oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mllama.modeling_mllama import _prepare_aspect_ratio_attention_mask

from vlmserve.bench.checkpoints import layout
from vlmserve.models.batch import ImageTiles, ImageToEncode
from vlmserve.models.vision.encoder import VisionEncoder, images_per_pass
from vlmserve.models.vision.real_first import RealFirst, real_first_attention

HEADS, HEAD_DIM = 2, 80  # 80 is the published width
PATCHES, PADDED = 17, 24
# float32; the two differ only in the order of sums
TOLERANCE = 2e-6


def states_of(seed: int, num_images: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(num_images, 4, PADDED, HEADS * HEAD_DIM)


def by_heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


@pytest.mark.parametrize("num_tiles", [(1,), (2,), (3,), (4,), (1, 4), (3, 3), (2, 4, 1, 3)])
def test_two_calls_without_a_mask_equal_transformers_masked_attention(
    num_tiles: tuple[int, ...],
) -> None:
    """Each position, padding included: its states are keys for the next layer's real patches."""
    order = RealFirst(num_tiles, 4, PATCHES, PADDED)
    states = [states_of(seed, len(num_tiles)) for seed in range(3)]
    is_real = torch.arange(4) < torch.tensor(num_tiles)[:, None]
    mask = _prepare_aspect_ratio_attention_mask(is_real.long(), PATCHES, PADDED, torch.float32)
    module: Any = torch.nn.Module()
    masked, _ = sdpa_attention_forward(
        module, *(by_heads(one.flatten(1, 2)) for one in states), mask, scaling=0.1
    )
    split, _ = real_first_attention(
        module, *(by_heads(order.ordered(one)) for one in states), order, scaling=0.1
    )
    expected = masked.flatten(2).unflatten(1, (4, PADDED))
    torch.testing.assert_close(order.by_tile(split.flatten(2)), expected, atol=TOLERANCE, rtol=0.0)
    # and the mask counts here: without it padding would be wrong
    free, _ = sdpa_attention_forward(
        module, *(by_heads(one.flatten(1, 2)) for one in states), torch.zeros_like(mask),
        scaling=0.1,
    )  # fmt: skip
    assert (free - masked).abs().max() > 1e-3


def test_the_order_has_real_patches_first_and_can_be_reversed() -> None:
    order = RealFirst((2, 4), 4, PATCHES, PADDED)
    tiles = states_of(0, 2)
    ordered = order.ordered(tiles)
    assert torch.equal(order.by_tile(ordered), tiles)
    assert order.num_real == [2 * PATCHES, 4 * PATCHES]
    assert torch.equal(ordered[0, : 2 * PATCHES], tiles[0, :2, :PATCHES].flatten(0, 1))


def encoder(name: str) -> VisionEncoder:
    model = loaded(name)
    return VisionEncoder(model.model, model.normalization, torch.device("cpu"))


@torch.no_grad()
def transformers_states(name: str, tiles: ImageTiles, pixels: Tensor) -> Tensor:
    """The projected states of the real tiles, by the mended model with its mask."""
    model = oracle(name).model
    is_real = torch.arange(4) < tiles.num_tiles
    states = model.vision_model(
        pixel_values=pixels[:, None],
        aspect_ratio_ids=torch.tensor([[tiles.aspect_ratio_id]]),
        aspect_ratio_mask=is_real[None, None].long(),
    ).last_hidden_state[0, 0, : tiles.num_tiles]
    projected: Tensor = model.multi_modal_projector(states).flatten(0, 1)
    return projected


@pytest.mark.parametrize("name", [*TINY_LAYOUTS[:1], "all-kv-heads"])
def test_the_encoder_equals_transformers_with_its_mask_for_every_layout_of_tiles(name: str) -> None:
    own = encoder(name)
    images = [image(ratio, seed=ratio) for ratio in NUM_TILES]
    with torch.inference_mode():
        together = own.encode([ImageToEncode(one, []) for one in images])
        assert together is not None
        begin = 0
        for one in images:
            expected = transformers_states(name, one, own.pixel_values([one]))
            alone = own.encode([ImageToEncode(one, [])])
            shared = together[begin : begin + len(expected)]
            for actual in (alone, shared):
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0.0)
            begin += len(expected)
    assert begin == len(together)


class Attention(TorchDispatchMode):
    """Records the kernels of attention, and whether they get a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "attention" in func._schema.name:
            with_mask = (kwargs or {}).get("attn_mask") is not None
            self.calls.append((func._schema.name, with_mask))
        return func(*args, **(kwargs or {}))


def test_the_encoder_attends_with_the_flash_kernel_and_makes_no_mask() -> None:
    with torch.no_grad(), Attention() as seen:  # inference mode hides which kernel is called
        encoder("tiny").encode([ImageToEncode(image(1, 0), [])])
    assert seen.calls == [("aten::_scaled_dot_product_flash_attention_for_cpu", False)] * 8


def test_a_published_image_is_encoded_alone_and_small_ones_together() -> None:
    assert images_per_pass(layout("11b").vision_config) == 1
    assert images_per_pass(layout("m100").vision_config) == 4
    assert images_per_pass(layout("tiny").vision_config) == 4
    passes: list[int] = []
    own = encoder("tiny")
    first = own._layered._layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    with torch.inference_mode():
        own.encode([ImageToEncode(image(1, seed), []) for seed in range(6)])
    hook.remove()
    assert passes == [4, 2]
