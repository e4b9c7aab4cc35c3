"""The HTTP side: OpenAI's `/v1/embeddings`, health and metrics, and one shape for every error."""

import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.exceptions import HTTPException

from .batching import Overloaded
from .inputs import InputError, parse_request
from .service import EmbeddingService


def make_app(service: EmbeddingService) -> FastAPI:
    """The application that answers by `service`, and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # Without the pages for trying it out: they load scripts from another host.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answered = Counter("proclip_requests", "Requests answered.", ["status"], registry=service.registry)
    seconds = Histogram("proclip_request_seconds", "Time to answer a request.", registry=service.registry)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        start = time.perf_counter()
        response = await _answer(service, request)
        answered.labels(str(response.status_code)).inc()
        seconds.observe(time.perf_counter() - start)
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.encoder.name, "object": "model", "owned_by": "proclip"}]}

    @app.get("/health")
    async def health() -> Response:
        status = 200 if service.healthy else 503
        return JSONResponse({"status": "ok" if service.healthy else "stopped", "model": service.encoder.name}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        return _error(f"{request.method} {request.url.path}: {error.detail}", error.status_code)

    return app


async def _answer(service: EmbeddingService, http_request: Request) -> Response:
    try:
        request = parse_request(await _read(http_request, service.limits.body_bytes))
        answer = await service.answer(request)
    except InputError as error:
        return _error(str(error), error.status, error.param)
    except Overloaded:
        return _error("too many requests are waiting: try again later", 429)
    except Exception as error:  # the server goes on, and whoever asked is told
        return _error(f"{type(error).__name__}: {error}", 500)
    if request.encoding_format == "base64":
        values: list[Any] = [base64.b64encode(row.numpy().astype("<f4").tobytes()).decode() for row in answer.values]
    else:
        values = answer.values.tolist()
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.encoder.name, "usage": usage})


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise InputError(f"the body has more than {max_bytes:,} bytes", status=413)
    return bytes(body)


def _error(message: str, status: int, param: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": None}}, status)
