"""HTTP as OpenAI's clients speak it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware

from open_autoglm.serving.admin import admin_routes
from open_autoglm.serving.asgi import App
from open_autoglm.serving.failures import EXPECTED, bug, failure, invalid, json_response, told
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.inference import Inference, require_model
from open_autoglm.serving.openai_types import ChatRequest, CompletionRequest
from open_autoglm.serving.openapi import (
    KEY,
    Alive,
    ChatCompletion,
    Completion,
    ModelCard,
    ModelList,
    Prepared,
    Responses,
    Unprepared,
    answers,
    refusals,
)
from open_autoglm.serving.service import Service


def create_app(fleet: Fleet, warning: Callable[[], str] = str) -> App:
    """The application that serves ``fleet``; ``/readyz`` says what ``warning`` returns, if anything."""
    app = FastAPI(title="Open-AutoGLM endpoint", version=version("open-autoglm"), redoc_url=None)
    _add_errors(app)
    _describe_inference(app)
    _add_models(app, fleet)
    _add_health(app, fleet, warning)
    app.include_router(admin_routes(fleet))
    return ServerErrorMiddleware(Inference(fleet, app), handler=_bug)


def _describe_inference(app: FastAPI) -> None:
    """For ``/docs`` and ``/openapi.json`` alone: `Inference` takes these requests before they come here."""

    @app.post("/v1/completions", responses=answers(Completion))
    async def completions(body: CompletionRequest) -> None:
        """Continue a prompt, or several."""

    @app.post("/v1/chat/completions", responses=answers(ChatCompletion))
    async def chat(body: ChatRequest) -> None:
        """Answer a conversation."""


# ── models ───────────────────────────────────────────────────────────────────────────────────────


def _add_models(app: FastAPI, fleet: Fleet) -> None:
    @app.get("/v1/models", responses=KEY)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[_model(fleet.champion)])

    @app.get("/v1/models/{name:path}", responses=refusals(401, 403, 404))
    async def model(name: str) -> ModelCard:
        """The model, if it is this one."""
        require_model(fleet, name)
        return _model(fleet.champion)


def _model(service: Service) -> ModelCard:
    ready = service.engine.ready
    return ModelCard(
        id=service.name,
        created=service.created,
        max_model_len=service.max_tokens,
        version=service.version,
        bundle_digest=service.digest,
        slots=ready.slots if ready else 0,
    )


# ── health ───────────────────────────────────────────────────────────────────────────────────────


def _add_health(app: FastAPI, fleet: Fleet, warning: Callable[[], str]) -> None:
    @app.get("/healthz", responses=refusals(403))
    async def healthz() -> Alive:
        """The server answers."""
        return Alive()

    starting: Responses = {503: {"model": Unprepared, "description": "The engine does not answer"}}

    @app.get("/readyz", responses={**refusals(403), 200: {"model": Prepared}, **starting})
    async def readyz() -> Response:
        """The engine answers; 503 with the reason while it does not."""
        engine = fleet.champion.engine
        if engine.state == "ready":
            words = warning()
            return json_response({"status": "ready"} | ({"warning": words} if words else {}))
        return json_response({"status": engine.state, "reason": engine.last_words}, 503)

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses={**KEY, **text}, response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(fleet.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def _add_errors(app: FastAPI) -> None:
    async def expected(_request: Request, error: Exception) -> Response:
        return failure(error)

    for kind in EXPECTED:
        app.add_exception_handler(kind, expected)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        return invalid(problem["loc"][1:], problem["msg"])

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = f"{request.scope['path']}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return told(error.status_code, "invalid_request_error", message, headers=headers)

    app.add_exception_handler(Exception, _bug)


async def _bug(request: Request, _error: Exception) -> Response:
    """Starlette raises it again, so that its traceback gets into the log."""
    return bug(getattr(request.state, "request_id", "unknown"))
