"""The routes of a server: what arrives, what is answered, and what is said where neither can be.

FastAPI is imported where an app is made. Bodies are read here and not by FastAPI, so that they are bounded, JSON is
JSON, and errors name the field.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from flexrec.serving.batching import Batcher
from flexrec.serving.lookup import MOST, Lookup
from flexrec.serving.metrics import ServerMetrics
from flexrec.serving.options import ServeOptions
from flexrec.serving.ranker import Ranker
from flexrec.serving.refused import Refused
from flexrec.serving.requests import check_text, parse_json
from flexrec.serving.rerank import read_reranking, response_of

logger = logging.getLogger(__name__)
Handler = Callable[[Any], Awaitable[Any]]  # of a starlette.requests.Request, to a Response or what JSON says
RANK, SCORE = "rank", "score"  # kinds of work


def require_serving() -> None:
    """Raise an ImportError that says how to get what a server is made of, where it is not there."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"flexrec serve needs fastapi, uvicorn and prometheus_client ({error}): "
            f"run `.venv/bin/pip install -e '.[serve]'`"
        ) from error


def make_app(ranker: Ranker, options: ServeOptions | None = None) -> Any:
    """The FastAPI app that answers with a ranker."""
    require_serving()
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    options = options or ServeOptions()
    batcher = Batcher({RANK: ranker.rank, SCORE: ranker.score}, options, lambda size: metrics.ranked(size))
    metrics = ServerMetrics(lambda: batcher.waiting)
    routes = _Routes(ranker, options, batcher, metrics)

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="FlexRec", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for method, path, handler in routes.all():
        app.add_route(path, _endpoint(handler), methods=[method])

    async def not_there(request: Any, error: Any) -> Any:
        said = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        message = said.get(error.status_code, str(error.detail))
        return _json({"message": message}, error.status_code, error.headers)

    async def failed(request: Any, error: Exception) -> Any:
        return _json({"message": "the server failed at this request; its log says how"}, 500)

    app.add_exception_handler(HTTPException, not_there)
    app.add_exception_handler(Exception, failed)
    page, policy = _page()

    async def front(request: Any) -> Any:
        return Response(page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    app.add_route("/", front, methods=["GET"])
    app.add_middleware(_Counted, metrics=metrics)
    return app


class _Counted:
    """Every request counts when it is answered, whatever with."""

    def __init__(self, app: Any, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def spy(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, spy)
        finally:
            self._metrics.answered(scope["path"], status, time.perf_counter() - start)


class _Routes:
    """What is answered where."""

    def __init__(self, ranker: Ranker, options: ServeOptions, batcher: Batcher, metrics: ServerMetrics) -> None:
        self._ranker, self._options, self._batcher, self._metrics = ranker, options, batcher, metrics
        self._lookup = Lookup(ranker)

    def all(self) -> list[tuple[str, str, Handler]]:
        """Methods, paths and handlers."""
        return [
            ("POST", "/rank", self.rank),
            ("POST", "/rerank", self.rerank),
            ("POST", "/v1/rerank", self.rerank),
            ("POST", "/v2/rerank", self.rerank),
            ("GET", "/needs", self.needs),
            ("GET", "/users", self.users),
            ("GET", "/users/{user:path}", self.user),
            ("GET", "/items", self.items),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
        ]

    async def rank(self, request: Any) -> Any:
        body = await self._body(request)
        if not isinstance(body, (dict, list)) or not body:
            raise Refused(422, "the body must be a request, a JSON object, or a list of such")
        if isinstance(body, dict):
            (answer,) = await self._batcher.answer(RANK, [body])
            if "error" in answer:
                raise Refused.by_ranker(answer["error"])
            return answer
        # Of a list, one that is malformed costs no other.
        return await self._batcher.answer(RANK, body)

    async def rerank(self, request: Any) -> Any:
        body = await self._body(request)
        asked = read_reranking(body, self._ranker)
        (answer,) = await self._batcher.answer(SCORE, [asked.request])
        return response_of(asked, answer, "2" if request.url.path.startswith("/v2") else "1")

    async def needs(self, request: Any) -> Any:
        return {"needs": self._lookup.needs}

    async def users(self, request: Any) -> Any:
        return self._lookup.users(request.query_params.get("query", ""), _number(request, "limit", 20, MOST))

    async def user(self, request: Any) -> Any:
        user = request.path_params["user"]
        found = self._lookup.history(user)
        if found is None:
            raise Refused(404, f"there is no user {ascii(user)[:60]} in the log of this run")
        return found

    async def items(self, request: Any) -> Any:
        if "sample" in request.query_params:
            seed = _number(request, "seed", 0, 2**53) if "seed" in request.query_params else None
            return self._lookup.sample(_number(request, "sample", 20, MOST), seed)
        query, limit = request.query_params.get("query", ""), _number(request, "limit", 20, MOST)
        return await asyncio.to_thread(self._lookup.items, query, limit)

    async def health(self, request: Any) -> Any:
        return {
            "status": "ok",
            "needs": self._ranker.info.needs,
            "items": len(self._ranker.items),
            "users": len(self._ranker.users),
            "waiting": self._batcher.waiting,
        }

    async def metrics(self, request: Any) -> Any:
        from starlette.responses import Response

        text, kind = self._metrics.text()
        return Response(text, headers={"Content-Type": kind})

    async def _body(self, request: Any) -> Any:
        """What the body says; a Refused where it is too long, too slow, or no JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            got = f"got {ascii(kind)[:60]}" if kind else "there is none"
            raise Refused(415, f"the content type must be application/json, {got}")
        try:
            text = await asyncio.wait_for(self._text(request), self._options.timeout)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body took longer than {self._options.timeout:g} s", "", _CLOSE) from None
        try:
            body = parse_json(text)
            check_text(body)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return body

    async def _text(self, request: Any) -> bytes:
        most = self._options.max_body
        too_long = Refused(413, f"a body has at most {most} bytes", "", _CLOSE)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_long
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_long
            parts.append(part)
        return b"".join(parts)


_CLOSE = {"Connection": "close"}  # what of a body was not read would be taken for the next request


def _endpoint(handler: Handler) -> Handler:
    """A handler whose refusals are answers."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response

    async def endpoint(request: Any) -> Any:
        try:
            found = await handler(request)
        except Refused as refused:
            return _json(refused.body(), refused.status, refused.headers)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return found if isinstance(found, Response) else _json(found)

    return endpoint


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    from starlette.responses import Response

    text = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    return Response(text, status, dict(headers or {}), "application/json")


def _number(request: Any, name: str, default: int, most: int) -> int:
    """A whole number of the query, at most so large."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise Refused(422, f"{name}: must be a whole number, got {ascii(text)[:60]}", name)
    return min(int(text), most)


def _page() -> tuple[bytes, str]:
    """The page at /, and the policy that lets its own script and style run, and nothing else."""
    page = files("flexrec.serving").joinpath("page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy
