"""Checks the small files of a checkpoint before a process starts: types, sizes and links.

Reads the fields that the engine and the workers use, so that a damaged file is one line at the
start. Order: links, then config.json, generation_config.json, the image processor's settings,
tokenizer_config.json and tokenizer.json. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from ..batch import NonNegative, Positive
from ..errors import ModelError

# The published tokenizer.json has 17 MB, and each other file less than a hundred kilobytes.
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 16 << 20, 256 << 20
IMAGE_TOKEN = "<|image|>"
LINKED = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")

Side = Annotated[int, msgspec.Meta(ge=1, le=8192)]
TokenIds = NonNegative | list[NonNegative] | None


Fields = TypeVar("Fields", bound=msgspec.Struct)


class TextSizes(msgspec.Struct):
    """text_config of config.json; transformers has a default for each field that is missing."""

    hidden_size: Positive = 1
    intermediate_size: Positive = 1
    num_hidden_layers: Positive = 1
    num_attention_heads: Positive = 1
    num_key_value_heads: Positive = 1
    vocab_size: Positive = 1
    max_position_embeddings: Positive = 1
    cross_attention_layers: list[NonNegative] | None = None
    eos_token_id: TokenIds = None
    rms_norm_eps: float = 1e-5
    hidden_act: str = ""


class VisionSizes(msgspec.Struct):
    """vision_config of config.json."""

    hidden_size: Positive = 1
    intermediate_size: Positive = 1
    num_hidden_layers: Positive = 1
    num_global_layers: NonNegative = 1
    attention_heads: Positive = 1
    image_size: Side = 1
    patch_size: Side = 1
    max_num_tiles: Positive = 1
    supported_aspect_ratios: list[list[Positive]] | None = None
    intermediate_layers_indices: list[NonNegative] | None = None


class Config(msgspec.Struct):
    """config.json."""

    text_config: TextSizes
    vision_config: VisionSizes
    image_token_index: NonNegative = 0
    dtype: str | None = None
    torch_dtype: str | None = None


class GenerationConfig(msgspec.Struct):
    """generation_config.json."""

    eos_token_id: TokenIds = None


class ImageSize(msgspec.Struct):
    """Pixels of a tile."""

    height: Side
    width: Side


class ImageProcessor(msgspec.Struct):
    """preprocessor_config.json, or image_processor in processor_config.json."""

    size: Side | ImageSize | None = None
    max_image_tiles: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


class ProcessorConfig(msgspec.Struct):
    """processor_config.json."""

    image_processor: ImageProcessor | None = None


class TemplateConfig(msgspec.Struct):
    """chat_template.json."""

    chat_template: str | list[dict[str, str]] | None = None


class TokenizerConfig(TemplateConfig):
    """tokenizer_config.json."""

    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None


class AddedToken(msgspec.Struct):
    """A token with an id of its own in tokenizer.json."""

    id: NonNegative
    content: str


class TokenizerModel(msgspec.Struct):
    """The model in tokenizer.json. vocab: tokens with their ids, or pairs with their scores."""

    vocab: dict[str, int] | list[Any]


class TokenizerFile(msgspec.Struct):
    """tokenizer.json."""

    model: TokenizerModel
    added_tokens: list[AddedToken] = []


OPTIONAL_FILES: dict[str, type[msgspec.Struct]] = {
    "generation_config.json": GenerationConfig,
    "preprocessor_config.json": ImageProcessor,
    "processor_config.json": ProcessorConfig,
    "tokenizer_config.json": TokenizerConfig,
    "chat_template.json": TemplateConfig,
}


def check_config_files(folder: Path) -> None:
    """Raise ModelError, one line with the remedy, for the first file that cannot be used."""
    _check_links(folder)
    _read(folder / "config.json", Config, MAX_CONFIG_BYTES)
    for name, kind in OPTIONAL_FILES.items():
        if (folder / name).exists():
            _read(folder / name, kind, MAX_CONFIG_BYTES)
    _check_template(folder / "chat_template.jinja")
    _check_tokenizer(folder / "tokenizer.json")


def _check_links(folder: Path) -> None:
    """No file may be a link that leaves the folder; in the hub's cache, the model's own files."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for file in (file for pattern in LINKED for file in sorted(folder.glob(pattern))):
        try:
            target = file.resolve()
        except (OSError, RuntimeError):
            raise ModelError(f"{folder}: {file.name} is a link to itself") from None
        if not target.is_relative_to(root):
            raise ModelError(
                f"{folder}: {file.name} is a link to {target}, outside of the folder; copy the "
                "file into it"
            )


def _check_template(file: Path) -> None:
    if file.exists():
        try:
            _content(file, MAX_CONFIG_BYTES).decode()
        except UnicodeDecodeError:
            raise ModelError(
                f"{file.parent}: {file.name} is not UTF-8; download it again"
            ) from None


def _check_tokenizer(file: Path) -> None:
    if not file.exists():
        raise ModelError(f"{file.parent} has no {file.name}: copy it beside the weights")
    tokenizer = _read(file, TokenizerFile, MAX_TOKENIZER_BYTES)
    added = (token.content for token in tokenizer.added_tokens)
    if IMAGE_TOKEN not in tokenizer.model.vocab and IMAGE_TOKEN not in added:
        raise ModelError(
            f"{file.parent}: {file.name} has no token {IMAGE_TOKEN}; it is of another model"
        )


def _read(file: Path, kind: type[Fields], max_bytes: int) -> Fields:
    """The file's fields that are used. Raises ModelError."""
    try:
        return msgspec.json.decode(_content(file, max_bytes), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = str(error) if not isinstance(error, RecursionError) else "it nests too deeply"
        raise ModelError(
            f"{file.parent}: {file.name} is damaged: {why}; download it again"
        ) from None


def _content(file: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. Raises ModelError if it is too large or cannot be read."""
    try:
        if not file.is_file():
            raise ModelError(f"{file.parent}: {file.name} is not a file")
        size = file.stat().st_size
        if size > max_bytes:
            raise ModelError(
                f"{file.parent}: {file.name} has {size:,} bytes, which is too large for it (at "
                f"most {max_bytes:,}); download it again"
            )
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file.parent}: {file.name} cannot be read: {error.strerror}") from None
