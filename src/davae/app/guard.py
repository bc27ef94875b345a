"""Guard before Gradio: a request passes only if everything about it is allowed."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from davae.app.access import Access, parse_host, same_origin
from davae.app.limits import (
    Bounds,
    Refused,
    bounded_body,
    content_length,
    is_below,
    make_room,
    occupied,
    read_body,
    replayed,
    wrong_call,
)
from davae.app.turns import number_request

API = "/gradio_api"
FILE = f"{API}/file="
UPLOAD = f"{API}/upload"
JOIN = f"{API}/queue/join"
PAGES = re.compile(r"/|/reports/[a-z0-9-]{1,40}")
ROUTES: dict[str, tuple[re.Pattern[str], ...]] = {  # all that the page's own scripts ask for
    "GET": (
        PAGES,
        re.compile(r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d{1,4})?)"),
        re.compile(r"/(assets|static|svelte)/[\w@./-]{1,200}"),
        re.compile(rf"{API}/(info|app_id|startup-events|queue/data|queue/status|upload_progress)"),
        re.compile(rf"{API}/heartbeat/[\w-]{{1,64}}"),
        re.compile(rf"{re.escape(FILE)}.{{1,4096}}"),
    ),
    "POST": (re.compile(rf"{API}/(queue/join|cancel|reset/?|upload)"),),
}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
# Gradio's page has inline scripts, and its plots compile theirs; nothing may be fetched from or sent to another server.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
# A report and a file run apart from the page: their scripts, if any, get no cookie, no storage and no network.
APART_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
LOST = (
    '<!doctype html><meta charset="utf-8"><title>davae</title>{again}<p>This page needs the address that '
    "<code>davae app</code> printed, with its token.</p>"
)
AGAIN = '<meta http-equiv="refresh" content="0;url=/?again">'


class Guard:
    """ASGI middleware that checks each request before Gradio sees it.

    It checks host, origin, password, token, path, size and file arguments.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        uploads: Path,
        bounds: Bounds | None = None,
        inputs: Mapping[int, int] | None = None,
    ):
        self.app, self.access, self.uploads, self.bounds = app, access, uploads, bounds or Bounds()
        self.inputs = inputs  # how many arguments each handler of the page takes
        self._uploading = self._streaming = self._wrong = 0
        self._swept = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # the page has none
        else:
            await self._answer(scope, receive, _with_headers(scope, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            check_sender(scope, headers, self.access)
            await self._check_password(headers)
            response = self._check_token(scope, headers)
            if response is None:
                check_route(scope)
                await self._pass_on(_without_forwarding(scope), receive, send)
                return
        except Refused as refused:
            response = refused.response
        await response(scope, receive, send)

    async def _check_password(self, headers: Headers) -> None:
        given = headers.get("authorization")
        if self.access.has_password(given):
            return
        challenge = {"WWW-Authenticate": 'Basic realm="davae", charset="UTF-8"'}
        if given is not None:  # slow and few, so that passwords cannot be tried in bulk
            if self._wrong >= self.bounds.wrong:
                raise Refused(429, "too many wrong passwords; wait a second")
            self._wrong += 1
            try:
                await asyncio.sleep(1)
            finally:
                self._wrong -= 1
        raise Refused(401, "the page needs a user and a password", challenge)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        """Return None to go on, or the answer to a first visit or to one without the token."""
        try:
            query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            raise Refused(400, "the address has too many fields") from None
        token = query.get("token", [None])[0]
        cookies = [cookie_parser(line).get(self.access.cookie) for line in headers.getlist("cookie")]
        cookie = next((value for value in cookies if value), None)
        front = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if self.access.has_token(token, cookie, headers.get("authorization")):
            if not (front and token is not None):
                return None
            response: Response = RedirectResponse("/", 303)  # so that the token stays in no address and no history
            secure = scope["scheme"] == "https"
            response.set_cookie(
                self.access.cookie, self.access.cookie_value, httponly=True, samesite="strict", secure=secure
            )
            return response
        # A browser leaves a strict cookie out of a visit that another site led to; the page then loads itself again.
        led_here = headers.get("sec-fetch-site") == "cross-site" and "again" not in query
        again = AGAIN if front and token is None and led_here else ""
        return HTMLResponse(LOST.format(again=again), 401)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the page within the bounds on size, time, number and disk."""
        path = scope["path"]
        if path.startswith(FILE):
            if not is_below(path.removeprefix(FILE), self.uploads):
                raise Refused(403, "this file is not for you")
        elif path == UPLOAD:
            await self._sweep()
            await self._upload(scope, receive, send)
            return
        elif scope["method"] == "POST":
            await self._sweep()
            body = await read_body(scope, receive, self.bounds)
            line = wrong_call(body, self.uploads, self.inputs if path == JOIN else None)
            if line:
                raise Refused(400, line)
            receive = replayed(body, receive)
        elif path.startswith((f"{API}/heartbeat/", f"{API}/queue/data", f"{API}/upload_progress")):
            if self._streaming >= self.bounds.streams:
                raise Refused(503, "too many visitors; try again later")
            self._streaming += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._streaming -= 1
            return
        await self.app(scope, receive, send)

    async def _sweep(self) -> None:
        """Remove the oldest files beyond three quarters of the folder's limit, once a minute."""
        if time.monotonic() - self._swept > 60:
            self._swept = time.monotonic()
            await asyncio.to_thread(make_room, self.uploads, self.bounds.folder * 3 // 4)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        bounds = self.bounds
        length = content_length(scope)
        if length > bounds.upload:
            raise Refused(413, f"the page takes uploads of up to {bounds.upload >> 20} MiB")
        if self._uploading >= bounds.uploads:
            raise Refused(503, "too many uploads at once; try again later")
        self._uploading += 1
        try:
            taken = await asyncio.to_thread(occupied, self.uploads)
            room = min(bounds.folder - taken, shutil.disk_usage(self.uploads).free - bounds.spare)
            if length > room or room <= 0:
                raise Refused(507, "the page has no room for more files; try again later")
            await self.app(scope, bounded_body(receive, min(bounds.upload, room), bounds.seconds), send)
        finally:
            self._uploading -= 1


def check_sender(scope: Scope, headers: Headers, access: Access) -> None:
    """Refuse a request for another host (DNS rebinding) or from a page of another origin (CSRF).

    Args:
        scope: of the request.
        headers: of the request.
        access: hosts that the page answers to.

    Raises:
        Refused: not exactly one Host that the page answers to, a foreign Origin, or a subrequest of another site.
    """
    hosts = headers.getlist("host")
    host = parse_host(hosts[0]) if len(hosts) == 1 else None
    if host is None:
        raise Refused(400, "the request needs one Host")
    server = scope.get("server") or (None, None)
    if not access.answers_to(host, server[0]):
        raise Refused(403, "the page does not answer to this host; name it with --allow-host")
    origins = headers.getlist("origin")
    if len(origins) > 1 or (origins and not same_origin(origins[0], host)):
        raise Refused(403, "the request comes from another page")
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        framed = headers.get("sec-fetch-dest", "document") != "document"
        if not visit or framed or not PAGES.fullmatch(scope["path"]):
            raise Refused(403, "the request comes from another page")


def check_route(scope: Scope) -> None:
    """Refuse a request that the page's own scripts never make.

    Raises:
        Refused: a path or a method that is not on the list.
    """
    method, path = scope["method"], scope["path"]
    known = [name for name, patterns in ROUTES.items() if any(p.fullmatch(path) for p in patterns)]
    if ".." in path.split("/") and not path.startswith(FILE):
        known = []
    if not known:
        raise Refused(404, "there is nothing here")
    if (method if method != "HEAD" else "GET") not in known:
        raise Refused(405, "this is not done here", {"Allow": ", ".join(known)})


def _without_forwarding(scope: Scope) -> Scope:
    """Return a scope with its number and without headers that choose the page's own address."""
    dropped = (b"x-forwarded-host", b"x-gradio-server", b"x-direct-url", b"forwarded")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    return {**scope, "headers": number_request(kept)}


def _with_headers(scope: Scope, send: Send) -> Send:
    """Return a `send` that adds the security headers to the answer."""
    path = scope["path"]
    fixed = path.startswith(("/assets/", "/static/", "/svelte/"))
    apart = path.startswith((FILE, "/reports/"))

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers["Content-Security-Policy"] = APART_POLICY if apart else PAGE_POLICY
            if not fixed:
                headers["Cache-Control"] = "no-store"
            for name in ("access-control-allow-origin", "access-control-allow-credentials"):
                if name in headers:
                    del headers[name]
        await send(message)

    return sending
