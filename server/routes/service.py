"""Version, licence, manifest and metadata, with the paths and keys of NIM."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sanic import HTTPResponse, Request

from ... import __version__
from ..api.endpoint import Reply, Routes
from ..api.services import json_response, services_of
from ..errors import ApiError
from ..schemas.service_answers import (
    LicenseAnswer,
    LicenseInfo,
    ManifestAnswer,
    MetadataAnswer,
    VersionAnswer,
)
from .model_card import License, ModelFolderCard

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
