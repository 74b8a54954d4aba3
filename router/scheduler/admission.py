"""Which requests can ever be served, decided before they wait.

Owns the checks of a request against the model and the pools. Knows nothing of other requests: the
queue has its own limits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...models.batch import ImageRef, ImageSpan, ImageTiles, ModelInfo
from ..blocks.image_pool import ImageKey
from ..errors import InvalidRequestError
from ..messages import AddRequest

# Mllama's input embedding has eight rows beyond the vocabulary, `<|image|>` first.
NUM_EXTRA_EMBEDDINGS = 8


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits of one request."""

    max_model_len: int
    num_embeddings: int
    num_image_blocks: int
    max_num_tiles: int
    tile_size: int

    @classmethod
    def of(cls, info: ModelInfo) -> AdmissionLimits:
        """The limits of a loaded model. The context is at most the size of the text pool."""
        pools = info.pools
        return cls(
            max_model_len=min(info.max_model_len, pools.num_text_blocks * pools.block_size),
            num_embeddings=info.vocab_size + NUM_EXTRA_EMBEDDINGS,
            num_image_blocks=pools.num_image_blocks,
            max_num_tiles=info.max_num_tiles,
            tile_size=info.tile_size,
        )


def check_request(request: AddRequest, limits: AdmissionLimits) -> None:
    """Raises InvalidRequestError if an idle engine could not serve `request`.

    The message names the value, the limit and the remedy.
    """
    _check_tokens(request.prompt_token_ids, limits)
    if len(request.images) != len(request.spans):
        raise InvalidRequestError(
            f"the request has {len(request.images)} images but {len(request.spans)} spans: "
            "give one span for each image"
        )
    for image in request.images:
        _check_tiles(image, limits)
    _check_spans(request.spans, len(request.prompt_token_ids))
    check_image_blocks(request, limits.num_image_blocks)


def _check_tokens(token_ids: list[int], limits: AdmissionLimits) -> None:
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens: send at least one")
    if len(token_ids) + 1 > limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids):,} tokens and needs at least one more; "
            f"max_model_len is {limits.max_model_len:,}: shorten it or start the server with a "
            "larger --max-model-len or more cache"
        )
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= limits.num_embeddings:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"token id {wrong} is out of range: send ids from 0 to {limits.num_embeddings - 1}"
        )


def _check_tiles(image: ImageRef, limits: AdmissionLimits) -> None:
    if image.num_tiles > limits.max_num_tiles or image.tile_size != limits.tile_size:
        raise InvalidRequestError(
            f"an image has {image.num_tiles} tiles of {image.tile_size} pixels; the model takes "
            f"up to {limits.max_num_tiles} of {limits.tile_size}: tile it for this model"
        )
    if isinstance(image, ImageTiles) and len(image.data) != image.num_bytes:
        raise InvalidRequestError(
            f"an image has {len(image.data):,} bytes; its tiles need {image.num_bytes:,}"
        )


def _check_spans(spans: list[ImageSpan], num_prompt_tokens: int) -> None:
    last_start = -1
    for span in spans:
        if span.start >= num_prompt_tokens or (span.end is not None and span.end <= span.start):
            raise InvalidRequestError(
                f"an image's span [{span.start}, {span.end}) covers none of the prompt's "
                f"{num_prompt_tokens} tokens"
            )
        if span.start <= last_start:
            raise InvalidRequestError(
                f"an image's span starts at {span.start}, not after the previous span at "
                f"{last_start}: give each image its own token, in prompt order"
            )
        last_start = span.start


def check_image_blocks(request: AddRequest, num_image_blocks: int) -> None:
    """Raises InvalidRequestError if the images of `request` do not fit into a pool of this size.

    The message names both numbers and the remedy.
    """
    keys = {ImageKey.of(image, request.tenant) for image in request.images}
    num_tiles = sum(key.num_tiles for key in keys)
    if num_tiles > num_image_blocks:
        raise InvalidRequestError(
            f"the request's images have {num_tiles:,} tiles; the cache has "
            f"{num_image_blocks:,}: send fewer or smaller images or start the server with "
            "more image blocks"
        )
