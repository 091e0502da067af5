"""``/v1/models``, ``/health`` and ``/metrics``: what the server says of itself."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ggufkit.serve.api.answering import service_of
from ggufkit.serve.api.metrics import CONTENT_TYPE, written
from ggufkit.serve.api.models import Offer

router = APIRouter(tags=["status"])


@router.get("/v1/models", summary="The models that can be asked")
async def models(http: HttpRequest) -> dict[str, Any]:
    """All models, loaded or not."""
    return {"object": "list", "data": [_told(http, o) for o in service_of(http).models.offers]}


@router.get("/v1/models/{name:path}", summary="One of the models")
async def model(http: HttpRequest, name: str) -> dict[str, Any]:
    """One model, if there is one of that name."""
    return _told(http, service_of(http).models.find(name))


def _told(http: HttpRequest, offer: Offer) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": offer.name,
        "object": "model",
        "created": offer.created,
        "owned_by": "ggufkit",
    }
    hosted = next((h for h in service_of(http).models.loaded if h.name == offer.name), None)
    told["loaded"] = hosted is not None
    if hosted is not None:
        told["max_model_len"] = hosted.engine.context
        told["chat"] = hosted.prompts is not None
    return told


@router.get("/health", summary="Whether the server takes requests")
async def health(http: HttpRequest) -> Response:
    """``ok``, or status 503 while the server is shutting down or when a model has failed."""
    models = service_of(http).models
    if models.closing:
        return JSONResponse({"status": "shutting down"}, status_code=503)
    if not all(hosted.engine.healthy for hosted in models.loaded):
        return JSONResponse({"status": "a model has failed"}, status_code=503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", summary="Counts for Prometheus")
async def metrics(http: HttpRequest) -> Response:
    """Counts of all loaded models, in the text format of Prometheus."""
    return Response(written(http.app.state.registry), media_type=CONTENT_TYPE)
