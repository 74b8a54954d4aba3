"""Health, models and metrics."""

from __future__ import annotations

from urllib.parse import unquote

from prometheus_client import CONTENT_TYPE_LATEST
from sanic import HTTPResponse, Request

from ..api.endpoint import Reply, Routes
from ..api.services import Services, check_model, json_response, services_of
from ..http.auth import LIVE, READY, SHORT_READY
from ..schemas.model_answers import LiveAnswer, ModelCard, ModelList, ReadyAnswer, model_card
from . import samples

ROUTES = Routes("health", "Health and models")


@ROUTES.get(
    READY,
    SHORT_READY,
    replies=[
        Reply(
            type=ReadyAnswer,
            description="Requests are served.",
            example={"object": "health.response", "message": "Service is ready."},
        ),
        Reply(
            type=ReadyAnswer,
            status=503,
            description="The engine is not running, is loading its model, or sends no heartbeat.",
            example={"object": "health.response", "message": "Service is not ready."},
        ),
    ],
)
async def ready(request: Request) -> HTTPResponse:
    """200 while the engine has loaded its model and sends heartbeats, else 503."""
    is_ready = services_of(request).is_ready
    message = "Service is ready." if is_ready else "Service is not ready."
    answer: ReadyAnswer = {"object": "health.response", "message": message}
    return json_response(answer, 200 if is_ready else 503)


@ROUTES.get(
    LIVE,
    replies=[
        Reply(
            type=LiveAnswer,
            description="The process answers.",
            example={"object": "readyhealth.response", "message": "Service is live."},
        )
    ],
)
async def live(request: Request) -> HTTPResponse:
    """200 as long as the event loop runs."""
    answer: LiveAnswer = {"object": "readyhealth.response", "message": "Service is live."}
    return json_response(answer)


@ROUTES.get(
    "/v1/models",
    "/v1/openai/v1/models",
    replies=[
        Reply(
            type=ModelList,
            description="The model's names.",
            example=samples.MODEL_LIST,
            links={
                "model": {
                    "operationId": "get_v1_models_name_path",
                    "description": "One of them.",
                    "parameters": {"name": "$response.body#/data/0/id"},
                }
            },
        )
    ],
)
async def models(request: Request) -> HTTPResponse:
    """The model under each of its served names, then its adapters, whose parent it is."""
    services = services_of(request)
    names = [*services.settings.served_model_names]
    names += [adapter.name for adapter in services.adapters.registry.all()]
    answer: ModelList = {"object": "list", "data": [_card(services, name) for name in names]}
    return json_response(answer)


@ROUTES.get(
    "/v1/models/<name:path>",
    parameters={"name": "A served name; its slashes may be sent as they are or as %2F."},
    replies=[
        Reply(type=ModelCard, description="The model.", example=samples.MODEL_LIST["data"][0])
    ],
    refusals=[404],
)
async def model(request: Request, name: str) -> HTTPResponse:
    """The model under one of its served names, or an adapter, else 404."""
    name = unquote(name)
    check_model(request, name)
    return json_response(_card(services_of(request), name))


def _card(services: Services, name: str) -> ModelCard:
    """The card of a name of the model, or of an adapter's."""
    model, context = services.settings.model_name, services.max_model_len
    adapter = services.adapters.registry.find(name)
    if adapter is None:
        return model_card(name, model, services.started, context)
    return model_card(name, adapter.root, adapter.created, context, parent=model)


@ROUTES.get(
    "/metrics",
    "/v1/metrics",
    replies=[
        Reply(type=str, media_type=CONTENT_TYPE_LATEST, description="Prometheus' text format.")
    ],
)
async def metrics(request: Request) -> HTTPResponse:
    """This worker's metrics in Prometheus' text format."""
    services = services_of(request)
    return HTTPResponse(
        services.metrics.render(services.engine.stats), content_type=CONTENT_TYPE_LATEST
    )
