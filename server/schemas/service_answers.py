"""What a client of the service's own routes reads: version, licence, manifest and metadata.

Owns keys and their order, which are the documented service's. Knows nothing of files.
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


class ManifestAnswer(TypedDict):
    """manifest_file: a text of JSON, and so of YAML: the files of the model, with their bytes."""

    manifest_file: str


RenderingFormat = Literal["chat_template", "meta", "text"]


class RenderedImage(TypedDict):
    """An image of a prompt. position: the index of its token; it has one token of the prompt.

    num_tiles: how many tiles the model reads.
    """

    position: int
    num_tokens: int
    num_tiles: int


class RenderedPrompt(TypedDict):
    """A prompt as the model reads it; the text has the names of special tokens."""

    text: str
    token_ids: list[int]
    images: list[RenderedImage]


class Rendering(TypedDict):
    """The prompts of a request.

    format: chat_template, meta (Meta's format of Llama 3.2) or text (a completion's). reason: why
    it is meta. chat_template: the template's file. content_format: how the template gets contents.
    """

    object: Literal["rendering"]
    model: str
    format: RenderingFormat
    reason: str | None
    chat_template: str | None
    content_format: str | None
    prompts: list[RenderedPrompt]
