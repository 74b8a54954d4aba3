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
