"""The HTTP side: routes, streams, errors as JSON, and who is told to come back later.

Answers are made one after the other by one thread; whoever hangs up is no longer answered.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .chat import FULL, Asked, read
from .engine import Answer, Begun, Cancelled, Engine
from .errors import BadRequest, as_json
from .images import ImageRules, load_images

_log = logging.getLogger(__name__)
_BESIDE_IMAGES = 2**20  # bytes of a request's body
_GONE = 499  # what nginx logs where a client hung up; nobody reads it
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FAILED = "the model failed: see the server's log"
_BEGIN = {"role": "assistant", "content": ""}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many may at once."""

    new_tokens: int
    images: int
    waiting: int
    rules: ImageRules

    @property
    def body(self) -> int:
        """Bytes of a request's body: base64 makes four of three."""
        return self.images * self.rules.most_bytes * 4 // 3 + _BESIDE_IMAGES


@dataclass(eq=False)
class _Turn:
    """A request that was understood: what its answer's events go through, and how it is called off."""

    asked: Asked
    images: list[Image.Image]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Begun | str | Answer | Exception] = field(default_factory=asyncio.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    came: float = field(default_factory=time.monotonic)
    watcher: asyncio.Task[None] | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def tell(self, event: Begun | str) -> None:
        """From the thread that answers."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Chat:
    """A server's application, `app`.

    Args:
        name: of the model under its reduction.
        host: that the server listens on.
        key: that clients must send; None for none.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, host: str, key: str | None = None) -> None:
        self.engine = engine
        self.metrics = engine.metrics
        self.name = name
        self.limits = limits
        self._key = key
        # a page in a browser may have a name of its own mean this machine, and ask what only listens here
        self._hosts = {*_LOOPBACK, host} if ip_address(host).is_loopback else None
        self._worker = ThreadPoolExecutor(1, "thinsight-serve")
        self._turns: set[_Turn] = set()
        self._open = 0
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._page),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={BadRequest: _refused, HTTPException: _not_here, Exception: _failed},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        for turn in self._turns:
            turn.stop.set()
        await asyncio.to_thread(self._worker.shutdown)
        self.engine.close()

    # -- routes ------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _page(self, request: Request) -> Response:
        self._check_host(request)
        content, kind = self.metrics.page()
        return Response(content, headers={"content-type": kind})

    async def _models(self, request: Request) -> Response:
        self._check(request)
        about = {"object": "model", "created": self._started, "owned_by": "thinsight"}
        data = [{"id": name, **about} for name in (self.name, self.name + FULL)]
        return JSONResponse({"object": "list", "data": data})

    async def _chat(self, request: Request) -> Response:
        self._check(request)
        if self._open >= self.limits.waiting:
            self.metrics.requests.labels("", "busy").inc()
            message = f"{self._open} requests wait already: come back in a second"
            return JSONResponse(as_json(message, "overloaded_error"), 503, {"Retry-After": "1"})
        self._enter()
        try:
            turn = await self._turn(request)
        except BaseException:
            self._leave()
            raise
        turn.watcher = asyncio.create_task(_hung_up(request, turn.stop))
        first = await turn.events.get()
        if isinstance(first, Exception):
            return _gone(first)
        assert isinstance(first, Begun)
        if turn.asked.stream:
            return StreamingResponse(self._pieces(turn), media_type="text/event-stream")
        while True:
            event = await turn.events.get()
            if isinstance(event, Exception):
                return _gone(event)
            if isinstance(event, Answer):
                return JSONResponse(_whole(turn, event))

    # -- one request -------------------------------------------------------------------------------------

    async def _turn(self, request: Request) -> _Turn:
        """What is asked, checked and in the queue."""
        model = ""
        try:
            body = await self._body(request)
            asked = await asyncio.to_thread(read, body, self.name, self.limits.images, self.limits.new_tokens)
            model = asked.model
            images = await asyncio.to_thread(load_images, asked.addresses, self.limits.rules)
        except BadRequest:
            self.metrics.requests.labels(model, "refused").inc()
            raise
        except ClientDisconnect:
            self.metrics.requests.labels(model, "cancelled").inc()
            raise BadRequest("the request ended before its end", status=_GONE) from None
        turn = _Turn(asked, images, asyncio.get_running_loop())
        self._turns.add(turn)
        self._worker.submit(self._answer, turn)
        return turn

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # also what keeps pages in a browser from asking without a word of this server's
            raise BadRequest("the request's content-type is not application/json", status=415)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise BadRequest(
                    f"the request has more than {self.limits.body} bytes, the most that are taken", status=413
                )
            parts.append(part)
        return b"".join(parts)

    def _answer(self, turn: _Turn) -> None:
        """In the one thread that answers."""
        self.metrics.waited.observe(time.monotonic() - turn.came)
        event: Answer | Exception
        try:
            event, outcome = self.engine.answer(turn.asked, turn.images, turn.tell, turn.stop), "answered"
        except Cancelled as error:
            event, outcome = error, "cancelled"
        except BadRequest as error:
            event, outcome = error, "refused"
        except Exception as error:  # a model may raise anything, and the next request is another one
            _log.exception("a request failed")
            event, outcome = error, "failed"
        self.metrics.requests.labels(turn.asked.model, outcome).inc()
        turn.loop.call_soon_threadsafe(self._over, turn, event)

    def _over(self, turn: _Turn, event: Answer | Exception) -> None:
        self._turns.discard(turn)
        self._leave()
        if turn.watcher is not None:
            turn.watcher.cancel()
        turn.events.put_nowait(event)

    async def _pieces(self, turn: _Turn) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            yield _event(_chunk(turn, _BEGIN))
            while True:
                event = await turn.events.get()
                if isinstance(event, Exception):
                    yield _event(as_json(_FAILED, "server_error"))
                    return
                if isinstance(event, Answer):
                    break
                if isinstance(event, str):
                    yield _event(_chunk(turn, {"content": event}))
            yield _event(_chunk(turn, {}, event.finish))
            if turn.asked.usage:
                yield _event({**_chunk(turn, {}), "choices": [], "usage": _usage(event)})
            yield "data: [DONE]\n\n"
        finally:
            turn.stop.set()

    def _enter(self) -> None:
        self._open += 1
        self.metrics.open.set(self._open)

    def _leave(self) -> None:
        self._open -= 1
        self.metrics.open.set(self._open)

    # -- who asks ----------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        self._check_host(request)
        if self._key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise BadRequest("the request's key is not this server's", status=401, code="invalid_api_key")

    def _check_host(self, request: Request) -> None:
        named = request.headers.get("host", "")
        if self._hosts is not None and urllib.parse.urlsplit(f"//{named}").hostname not in self._hosts:
            raise BadRequest(f"the request is for host {named!r}, and this server listens on loopback only", status=403)


# -- what is sent --------------------------------------------------------------------------------------------


def _whole(turn: _Turn, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": turn.id,
        "object": "chat.completion",
        "created": turn.created,
        "model": turn.asked.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}],
        "usage": _usage(answer),
    }


def _chunk(turn: _Turn, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": turn.id,
        "object": "chat.completion.chunk",
        "created": turn.created,
        "model": turn.asked.model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }


def _usage(answer: Answer) -> dict[str, int]:
    prompt, made = answer.prompt_tokens, answer.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _gone(error: Exception) -> Response:
    """What ends a request before its answer."""
    if isinstance(error, BadRequest):
        raise error
    if isinstance(error, Cancelled):
        return Response(status_code=_GONE)
    return JSONResponse(as_json(_FAILED, "server_error"), 500)


async def _hung_up(request: Request, stop: threading.Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.set()


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(as_json(str(error), "invalid_request_error", error.field, error.code), error.status)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(as_json(message, "invalid_request_error"), error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(as_json(_FAILED, "server_error"), 500)
