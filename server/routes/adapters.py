"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, served with --allow-lora-updates only."""

from __future__ import annotations

from sanic import HTTPResponse, Request

from ..adapters.requests import LoadAdapterRequest, UnloadAdapterRequest
from ..api.endpoint import Reply, Routes
from ..api.services import services_of

ROUTES = Routes("adapters", "Adapters")
TEXT = "text/plain; charset=utf-8"


@ROUTES.post(
    "/v1/load_lora_adapter",
    body=LoadAdapterRequest,
    examples={"adapter": {"lora_name": "radiology", "lora_path": "radiology-v2"}},
    replies=[Reply(type=str, media_type=TEXT, description="It is served from now on.")],
    refusals=[404, 503],
)
async def load(request: Request, body: LoadAdapterRequest) -> HTTPResponse:
    """Serve another adapter, once every engine has read it."""
    await services_of(request).adapters.updates.load_for_client(
        body.lora_name, body.lora_path, in_place=bool(body.load_inplace)
    )
    return _text(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@ROUTES.post(
    "/v1/unload_lora_adapter",
    body=UnloadAdapterRequest,
    examples={"adapter": {"lora_name": "radiology"}},
    replies=[Reply(type=str, media_type=TEXT, description="No request uses it any longer.")],
    refusals=[404],
)
async def unload(request: Request, body: UnloadAdapterRequest) -> HTTPResponse:
    """Serve an adapter no longer. New requests get a 404 at once; the answer waits for old ones."""
    await services_of(request).adapters.updates.unload(body.lora_name)
    return _text(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _text(content: str) -> HTTPResponse:
    return HTTPResponse(content, content_type=TEXT)
