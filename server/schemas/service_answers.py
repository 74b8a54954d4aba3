"""What a client of the service's own routes reads: version, licence, manifest and metadata.

Owns keys and their order, which are the documented service's; also what SGLang's router asks, and
the limits that the playground reads. Knows nothing of files.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class VersionAnswer(TypedDict):
    """release: this server's version. api: the version of the paths and shapes that it serves."""

    release: str
    api: str


class LicenseInfo(TypedDict):
    """The model's licence, all empty where its folder has none.

    path: below the model's folder. sha: SHA-1 of the file. size: in characters. url: where it can
    be read, empty where that is not known.
    """

    name: str
    path: str
    sha: str
    size: int
    url: str
    type: Literal["file"]


class LicenseAnswer(LicenseInfo):
    """The same, with its whole text."""

    content: str


class ModelInfo(TypedDict):
    """shortName: the model's first name in the API. modelUrl: its page, or empty."""

    modelUrl: str
    shortName: str


class MetadataAnswer(TypedDict):
    """What is served. assetInfo and repository_override are empty: there is nothing to name.

    selectedModelProfileId: the SHA-256 of the model's config.json.
    """

    assetInfo: list[str]
    licenseInfo: LicenseInfo
    modelInfo: list[ModelInfo]
    repository_override: str
    version: str
    selectedModelProfileId: str


class SglangServerInfo(TypedDict):
    """What sglang-router reads of a server. served_model_name: the first of the model's names.

    dp_size: 1, since the server chooses among its replicas itself.
    """

    served_model_name: str
    dp_size: int
    max_running_requests: int
    version: str


class SglangModelInfo(TypedDict):
    """What SGLang's router and clients read of a model.

    model_path, tokenizer_path: the hub repository, or the served name without one. model_type,
    architectures: of the model's config.json.
    """

    model_path: str
    tokenizer_path: str
    is_generation: bool
    has_image_understanding: bool
    model_type: str
    architectures: list[str]


class ManifestAnswer(TypedDict):
    """manifest_file: a text of JSON, and so of YAML: the files of the model, with their bytes."""

    manifest_file: str


RenderingFormat = Literal["chat_template", "meta", "text"]


class RenderedImage(TypedDict):
    """An image of a prompt. position: the index of its token; it has one token of the prompt.

    num_tiles: how many tiles the model reads. digest: in hexadecimal digits; equal for equal files.
    """

    position: int
    num_tokens: int
    num_tiles: int
    digest: str


class RenderedPrompt(TypedDict):
    """A prompt as the model reads it; the text has the names of special tokens."""

    text: str
    token_ids: list[int]
    images: list[RenderedImage]


class Placeholder(TypedDict):
    """Where an image stands in a prompt. offset: of its first token; length: in tokens."""

    offset: int
    length: int


class ImageHashes(TypedDict):
    """The digests of a prompt's images, in the order of their places."""

    image: list[str]


class ImagePlaceholders(TypedDict):
    """The places of a prompt's images."""

    image: list[Placeholder]


class RenderedFeatures(TypedDict):
    """The images of a prompt in vLLM's form, which prefix routers hash."""

    mm_hashes: ImageHashes
    mm_placeholders: ImagePlaceholders


class Rendering(TypedDict):
    """The prompts of a request.

    token_ids, features: of the first prompt, as routers for vLLM read them; null without images.

    format: chat_template, meta (Meta's format of Llama 3.2) or text (a completion's). reason: why
    it is meta. chat_template: the template's file. content_format: how the template gets contents.
    """

    object: Literal["rendering"]
    model: str
    format: RenderingFormat
    reason: str | None
    chat_template: str | None
    content_format: str | None
    token_ids: list[int]
    features: RenderedFeatures | None
    prompts: list[RenderedPrompt]


class PlaygroundInfo(TypedDict):
    """The limits of this server. max_side: pixels of an image's longer side.

    is_bundled_model: it serves the small model that comes with it. tile_size, max_image_tiles: of
    the checkpoint's image processor.
    """

    version: str
    is_bundled_model: bool
    max_model_len: int
    tile_size: int
    max_image_tiles: int
    max_images: int
    max_image_bytes: int
    max_request_bytes: int
    max_pixels: int
    max_side: int
    max_body_bytes: int
