"""Version, licence, manifest and metadata as in NIM; server and model as SGLang's router asks.

Owns where licence, files and configuration are in the model's folder. Reads no weights.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from sanic import HTTPResponse, Request

from ... import __version__
from ..api.endpoint import Reply, Routes
from ..api.services import json_response, services_of
from ..cli.model_source import HUB_PATTERNS
from ..errors import ApiError
from ..schemas.service_answers import (
    LicenseAnswer,
    LicenseInfo,
    ManifestAnswer,
    MetadataAnswer,
    SglangModelInfo,
    SglangServerInfo,
    VersionAnswer,
)

HUB_URL = "https://huggingface.co"
# Version of the paths and formats.
API_VERSION = "1.0.0"

ROUTES = Routes("service", "The service")


class NoLicenseError(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "no_license"


@ROUTES.get(
    "/v1/version",
    replies=[
        Reply(
            type=VersionAnswer,
            description="The server's version.",
            example={"release": __version__, "api": API_VERSION},
        )
    ],
)
async def version(request: Request) -> HTTPResponse:
    """The server's version, and that of its API."""
    answer: VersionAnswer = {"release": __version__, "api": API_VERSION}
    return json_response(answer)


@ROUTES.get(
    "/v1/license",
    replies=[Reply(type=LicenseAnswer, description="The model's own licence file.")],
    refusals=(404,),
)
async def license_text(request: Request) -> HTTPResponse:
    """The licence in the model's folder; 404 without one."""
    card = _card(request)
    found = await asyncio.to_thread(card.license)
    if found is None:
        raise NoLicenseError("the model's folder has no LICENSE file: see where the model is from")
    info = _license_info(card, found)
    answer: LicenseAnswer = {
        "name": info["name"],
        "path": info["path"],
        "sha": info["sha"],
        "size": info["size"],
        "url": info["url"],
        "type": info["type"],
        "content": found.content,
    }
    return json_response(answer)


@ROUTES.get(
    "/v1/manifest",
    replies=[Reply(type=ManifestAnswer, description="The files of the model.")],
)
async def manifest(request: Request) -> HTTPResponse:
    """The files of the served model, with their sizes."""
    text = await asyncio.to_thread(_card(request).manifest)
    answer: ManifestAnswer = {"manifest_file": text}
    return json_response(answer)


@ROUTES.get(
    "/v1/metadata",
    replies=[Reply(type=MetadataAnswer, description="What is served, by which version.")],
)
async def metadata(request: Request) -> HTTPResponse:
    """What is served: licence, model and version."""
    card, settings = _card(request), services_of(request).settings
    found, digest = await asyncio.to_thread(lambda: (card.license(), card.config_digest()))
    answer: MetadataAnswer = {
        "assetInfo": [],
        "licenseInfo": _license_info(card, found),
        "modelInfo": [{"modelUrl": card.url, "shortName": settings.model_name}],
        "repository_override": "",
        "version": __version__,
        "selectedModelProfileId": digest,
    }
    return json_response(answer)


@ROUTES.get(
    "/server_info",
    "/get_server_info",
    replies=[Reply(type=SglangServerInfo, description="The model's name and the server's limits.")],
)
async def server_info(request: Request) -> HTTPResponse:
    """The model's name, as sglang-router asks for it."""
    settings = services_of(request).settings
    answer: SglangServerInfo = {
        "served_model_name": settings.model_name,
        "dp_size": 1,
        "max_running_requests": settings.max_num_seqs,
        "version": __version__,
    }
    return json_response(answer)


@ROUTES.get(
    "/model_info",
    "/get_model_info",
    replies=[Reply(type=SglangModelInfo, description="What kind of model it is.")],
)
async def model_info(request: Request) -> HTTPResponse:
    """The model's hub repository and architecture, as SGLang's clients ask for it."""
    settings = services_of(request).settings
    config = await asyncio.to_thread(_card(request).config)
    path = settings.hub_id or settings.model_name
    answer: SglangModelInfo = {
        "model_path": path,
        "tokenizer_path": path,
        "is_generation": True,
        "has_image_understanding": True,
        "model_type": config.get("model_type", ""),
        "architectures": config.get("architectures", []),
    }
    return json_response(answer)


def _card(request: Request) -> ModelFolderCard:
    settings = services_of(request).settings
    return ModelFolderCard(Path(settings.model), settings.hub_id)


def _license_info(card: ModelFolderCard, found: License | None) -> LicenseInfo:
    return {
        "name": found.name if found else "",
        "path": found.name if found else "",
        "sha": found.sha1 if found else "",
        "size": len(found.content) if found else 0,
        "url": card.license_url,
        "type": "file",
    }


@dataclass(frozen=True, slots=True)
class License:
    """The text of a folder's own licence file, and the file's name."""

    name: str
    content: str

    @property
    def sha1(self) -> str:
        return hashlib.sha1(self.content.encode(), usedforsecurity=False).hexdigest()


class ModelFolderCard:
    """hub_id: the repository on the hub that the folder came from; None for a local folder."""

    def __init__(self, folder: Path, hub_id: str | None) -> None:
        self._folder = folder
        self._hub_id = hub_id

    @property
    def url(self) -> str:
        """The model's page; empty without one."""
        return f"{HUB_URL}/{self._hub_id}" if self._hub_id else ""

    @property
    def license_url(self) -> str:
        """The licence's page on the hub; empty without one."""
        found = self.license()
        return f"{self.url}/blob/main/{found.name}" if self.url and found else ""

    def license(self) -> License | None:
        """The folder's own licence file, if any. There is no default."""
        for file in sorted(self._folder.glob("LICENSE*")):
            if file.is_file():
                return License(file.name, file.read_bytes().decode("utf-8", "replace"))
        return None

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        config: dict[str, Any] = orjson.loads((self._folder / "config.json").read_bytes())
        return config

    def config_digest(self) -> str:
        """SHA-256 of config.json: equal for equal models."""
        return hashlib.sha256((self._folder / "config.json").read_bytes()).hexdigest()

    def manifest(self) -> str:
        """The files that the server may read, with their sizes in bytes, as JSON."""
        names = {
            file.name: file.stat().st_size
            for pattern in HUB_PATTERNS
            for file in self._folder.glob(pattern)
            if file.is_file()
        }
        files = [{"name": name, "size_bytes": names[name]} for name in sorted(names)]
        return orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2).decode()
