"""Health, models and metrics: what operators and clients ask before they ask more."""

from __future__ import annotations

import uuid
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from sanic import Blueprint, HTTPResponse, Request

from .services import Services, json_response, services_of

LIVE = "/v1/health/live"
READY = "/v1/health/ready"


def blueprint() -> Blueprint:
    """The routes that generate nothing."""
    routes = Blueprint("health")
    routes.add_route(models, "/v1/models", methods=["GET", "HEAD"])
    routes.add_route(ready, READY, methods=["GET", "HEAD"])
    routes.add_route(live, LIVE, methods=["GET", "HEAD"])
    for number, path in enumerate(("/metrics", "/v1/metrics")):
        routes.add_route(metrics, path, methods=["GET", "HEAD"], name=f"metrics{number}")
    return routes


async def ready(request: Request) -> HTTPResponse:
    """200 while the engine has its model loaded and its heart beats, else 503."""
    is_ready = services_of(request).is_ready
    message = "Service is ready." if is_ready else "Service is not ready."
    return json_response(
        {"object": "health.response", "message": message}, 200 if is_ready else 503
    )


async def live(request: Request) -> HTTPResponse:
    """200 as long as the event loop runs. The object's name is the documented one."""
    return json_response({"object": "readyhealth.response", "message": "Service is live."})


async def models(request: Request) -> HTTPResponse:
    """The model under each of its served names."""
    services = services_of(request)
    cards = [_card(name, services) for name in services.settings.served_model_names]
    return json_response({"object": "list", "data": cards})


async def metrics(request: Request) -> HTTPResponse:
    """This worker's figures in Prometheus' text format."""
    services = services_of(request)
    return HTTPResponse(
        services.metrics.render(services.engine.stats), content_type=CONTENT_TYPE_LATEST
    )


def _card(name: str, services: Services) -> dict[str, Any]:
    # Made from the name: the same id on every call and from every worker.
    permission_id = uuid.uuid5(uuid.NAMESPACE_URL, f"vlmserve:{name}").hex
    return {
        "id": name,
        "object": "model",
        "created": services.started,
        "owned_by": "system",
        "root": services.settings.model_name,
        "parent": None,
        "max_model_len": services.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{permission_id}",
                "object": "model_permission",
                "created": services.started,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
