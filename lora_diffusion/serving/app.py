"""The HTTP side: routes that take orders and hand out results. Nothing is drawn here."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.generation.request import Request
from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.generation.sheet import Sheet
from lora_diffusion.serving.catalogue import Catalogue
from lora_diffusion.serving.guard import Guard, has_token
from lora_diffusion.serving.orders import DroppedOrder, Order, OrderBook, QueueFull, UnknownOrder
from lora_diffusion.serving.schemas import ImageOrder, SheetOrder, check_limits
from lora_diffusion.serving.worker import Worker

_RETRY_AFTER_S = 5


class _Json(JSONResponse):
    """Whatever texts of files and requests hold: half of a surrogate pair becomes a `?`."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )


@dataclass(frozen=True)
class Service:
    """What the routes work with."""

    engine: Engine
    library: AdapterLibrary
    book: OrderBook
    worker: Worker
    model_name: str
    precision: str
    shutdown: Callable[[], None]
    own_token: str
    """What allows a shutdown."""
    catalogue: Catalogue = field(default_factory=Catalogue)


def create_app(
    service: Service,
    *,
    hosts: Sequence[str] = (),
    token: str | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application; its life starts and ends the worker. hosts, token: see `Guard`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        on_start()
        try:
            yield
        finally:
            on_end()
            service.worker.stop()

    app = FastAPI(
        title="lora-diffusion", lifespan=lifespan, default_response_class=_Json, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, hosts=tuple(hosts), token=token)
    _add_error_handlers(app)
    _add_order_routes(app, service)
    _add_result_routes(app, service)
    _add_other_routes(app, service)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is `{"error": "what is wrong"}`."""

    @app.exception_handler(UserError)
    def wrong(_: HttpRequest, error: UserError) -> JSONResponse:
        return _Json({"error": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def invalid(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(str(step) for step in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
        if request.method == "POST" and "json" not in request.headers.get("content-type", "").lower():
            problems.insert(0, "an order is JSON: send it with the header `Content-Type: application/json`")
        return _Json({"error": "; ".join(problems)[:2000]}, 422)

    @app.exception_handler(StarletteHTTPException)
    def refused(_: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
        return _Json({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(UnknownOrder)
    def unknown(_: HttpRequest, _error: UnknownOrder) -> JSONResponse:
        return _Json({"error": "There is no such order."}, 404)

    @app.exception_handler(DroppedOrder)
    def dropped(_: HttpRequest, _error: DroppedOrder) -> JSONResponse:
        return _Json({"error": "The pictures were dropped to make room for newer ones. Draw them again."}, 410)

    @app.exception_handler(QueueFull)
    def full(_: HttpRequest, _error: QueueFull) -> JSONResponse:
        message = f"The engine is busy and its queue is full. Try again in {_RETRY_AFTER_S} seconds."
        return _Json({"error": message}, 429, {"Retry-After": str(_RETRY_AFTER_S)})

    @app.exception_handler(Exception)
    def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        """Starlette raises the error again after the answer, so that the server logs it."""
        message = f"The engine made a mistake ({type(error).__name__}). Its log has the details."
        return _Json({"error": message}, 500)


def _add_order_routes(app: FastAPI, service: Service) -> None:
    def limited(request: Request) -> Request:
        resolved = service.engine.checked(request)
        check_limits(resolved)
        return resolved

    def accept(requests: Sequence[Request], sheet: Sheet | None = None) -> dict[str, Any]:
        checked = tuple(service.engine.checked(request) for request in requests)
        for request in checked:
            service.library.check(request.adapters)
        order = Order(checked, sheet)
        position = service.book.add(order)
        return {"id": order.id, "position": position, "seed": checked[0].seed, "count": len(checked)}

    @app.post("/v1/images", status_code=202)
    def order_images(body: ImageOrder) -> dict[str, Any]:
        first = limited(body.request())
        answer = accept([replace(first, seed=first.seed + index) for index in range(body.count)])
        return answer | {"url": f"/v1/images/{answer['id']}"}

    @app.post("/v1/sheets", status_code=202)
    def order_sheet(body: SheetOrder) -> dict[str, Any]:
        sheet = body.sheet()
        sheet = replace(sheet, request=limited(sheet.request))
        answer = accept([cell.request for cell in sheet.cells(check_limits)], sheet)
        size = {"columns": len(sheet.x.values), "rows": len(sheet.y.values) if sheet.y else 1}
        return answer | size | {"sheets": len(sheet.z.values) if sheet.z else 1, "url": f"/v1/sheets/{answer['id']}"}


def _add_result_routes(app: FastAPI, service: Service) -> None:
    def found(kind: str, id: str) -> Order:
        order = service.book.get(id)
        if kind != ("images" if order.sheet is None else "sheets"):
            raise UnknownOrder
        return order

    @app.get("/v1/{kind}/{id}")
    def status(kind: str, id: str) -> dict[str, Any]:
        return _status(service, found(kind, id), f"/v1/{kind}/{id}")

    @app.delete("/v1/{kind}/{id}")
    def cancel(kind: str, id: str) -> dict[str, Any]:
        order = found(kind, id)
        service.book.cancel(order)
        return _status(service, order, f"/v1/{kind}/{id}")

    @app.get("/v1/sheets/{id}/sheet.png")
    def sheet(id: str) -> Response:
        order = found("sheets", id)
        if order.sheet_png is None:
            raise HTTPException(404, "The sheet is not done yet.")
        return _picture(order.sheet_png)

    @app.get("/v1/{kind}/{id}/preview.jpg")
    def preview(kind: str, id: str) -> Response:
        order = found(kind, id)
        order.want_preview()
        data = order.preview
        if data is None:
            raise HTTPException(404, "There is no preview yet; ask again after the next step.")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @app.get("/v1/{kind}/{id}/{number}.png")
    def image(kind: str, id: str, number: int) -> Response:
        order = found(kind, id)
        data = order.images[number] if 0 <= number < len(order.images) else None
        if data is None:
            raise HTTPException(404, "This picture does not exist or is not done yet.")
        return _picture(data)


def _add_other_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/adapters")
    def adapters() -> dict[str, Any]:
        return {"adapters": service.catalogue.list(service.library.paths)}

    @app.post("/v1/adapters/refresh")
    def refresh() -> dict[str, Any]:
        service.library.refresh()
        return adapters()

    @app.get("/v1/samplers")
    def samplers() -> dict[str, Any]:
        named = ((key, f"{sampler.label} {sampler.schedule_type}".strip()) for key, sampler in SAMPLERS.items())
        return {"samplers": [{"name": key, "label": label} for key, label in named]}

    @app.get("/v1/health")
    def health() -> dict[str, Any]:
        return _health(service)

    @app.post("/v1/shutdown", status_code=202)
    def shutdown(request: HttpRequest) -> dict[str, Any]:
        if not has_token(request.headers.get("authorization", ""), service.own_token):
            raise HTTPException(401, "Only who started the engine may end it: its token is in engine.json.")
        service.shutdown()
        return {"status": "ending"}


def _status(service: Service, order: Order, url: str) -> dict[str, Any]:
    step, steps = order.steps
    answer: dict[str, Any] = {
        "id": order.id,
        "status": order.status,
        "position": service.book.position(order),
        "progress": {"step": step, "steps": steps},
        "seconds": round(order.seconds, 3),
        "message": "",
        "error": order.error,
        "notes": list(order.notes),
        "seeds": [request.seed for request in order.requests],
        "images": [f"{url}/{n}.png" if image is not None else None for n, image in enumerate(order.images)],
        "preview": f"{url}/preview.jpg" if order.status == "running" else None,
    }
    if not order.has_ended and service.worker.waiting_for:
        answer["message"] = f"waiting for the device ({service.worker.waiting_for})"
    if order.sheet is not None:
        axes = {"x": order.sheet.x, "y": order.sheet.y, "z": order.sheet.z}
        answer["axes"] = {k: {"axis": a.name, "values": list(a.values)} if a else None for k, a in axes.items()}
        answer["sheet"] = f"{url}/sheet.png" if order.sheet_png is not None else None
    return answer


def _health(service: Service) -> dict[str, Any]:
    model = service.engine.model
    device = model.unet.device
    memory = {"process_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        memory["device_bytes"] = torch.cuda.memory_allocated(device)
    return {
        "status": "ok",
        "pid": os.getpid(),
        "base": service.model_name,
        "family": model.family,
        "default_size": list(model.default_size),
        "size_step": model.resolution_step,
        "device": str(device),
        "precision": service.precision,
        "batch_size": service.engine.batch_size,
        "memory": memory,
        "queue": service.book.num_waiting,
        "waiting_for": service.worker.waiting_for,
        "adapters": list(service.engine.adapters),
    }


def _picture(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})
