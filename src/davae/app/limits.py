"""Bounds of the requests to the page: bytes, time, nesting, named files, disk."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope

SESSION = re.compile(r"[\w-]{1,64}")
HALF = re.compile("[\ud800-\udfff]")  # of a pair of surrogates: no answer that repeats it can be encoded
LOCK = ".in-use"  # file in the folder of uploads, locked by its page
DEEPEST = 24  # levels of lists and objects in a request


@dataclass(frozen=True)
class Bounds:
    """Resources that the requests of all visitors together may take."""

    body: int = 2**20  # bytes of a request that is not an upload
    upload: int = 2**30  # bytes of one request that uploads
    folder: int = 4 * 2**30  # bytes that uploads and drawn images together occupy
    spare: int = 2**30  # bytes of the disk that stay free
    uploads: int = 4  # at once
    streams: int = 128  # connections that stay open, two a page
    seconds: float = 300.0  # for a request to arrive
    wrong: int = 8  # wrong passwords that are answered, late, at once


class Refused(Exception):
    """A request that goes no further.

    Attributes:
        response: what the client gets.
    """

    def __init__(self, status: int, line: str, headers: dict[str, str] | None = None):
        super().__init__(line)
        self.response: Response = PlainTextResponse(f"{line}\n", status, headers)


def content_length(scope: Scope) -> int:
    """Return the length that a request announces, 0 where it announces none.

    Raises:
        Refused: not a number.
    """
    text = Headers(scope=scope).get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise Refused(400, "Content-Length is not a number")
    return int(text)


async def read_body(scope: Scope, receive: Receive, bounds: Bounds) -> bytes:
    """Return the whole body of a request.

    Raises:
        Refused: it is too long or takes too long, or the client went away.
    """
    if content_length(scope) > bounds.body:
        raise Refused(413, f"the page takes requests of up to {bounds.body >> 10} KiB")
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the request was cut off")
                body += message.get("body", b"")
                if len(body) > bounds.body:
                    raise Refused(413, f"the page takes requests of up to {bounds.body >> 10} KiB")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "the request took too long") from None


def wrong_call(body: bytes, uploads: Path, inputs: Mapping[int, int] | None = None) -> str:
    """Return the fault of the JSON that the page's scripts post, '' for none.

    A record of a file anywhere in it must name an uploaded file: Gradio copies the files of all arguments into
    the folder that it serves, those of text fields too.

    Args:
        body: of the request.
        uploads: folder of uploads.
        inputs: how many arguments each handler takes, where the request calls one: Gradio fails for other numbers.
    """
    if not body.strip():
        return ""
    try:
        call = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return "the request is not JSON"
    if not isinstance(call, dict):
        return "the request is not an object"
    for key in ("session_hash", "event_id"):
        value = call.get(key)
        if value is not None and not (isinstance(value, str) and SESSION.fullmatch(value)):
            return f"{key} is not a plain name"
    if inputs is not None:
        number, data = call.get("fn_index"), call.get("data")
        if type(number) is not int or number not in inputs:
            return "the request calls nothing of this page"
        if not isinstance(data, list) or len(data) != inputs[number]:
            return "the request has another number of arguments than the page sends"
    waiting: list[tuple[Any, int]] = [(call, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return "the request is nested too deeply"
        if isinstance(value, dict):
            if "path" in value and not (
                value["path"] is None or (isinstance(value["path"], str) and is_below(value["path"], uploads))
            ):
                return "the request names a file that was not uploaded"
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, float) and not math.isfinite(value):  # 1e999
            return "the request has a number that is not finite"
        elif isinstance(value, str) and HALF.search(value):
            return "the request has characters that are not text"
    return ""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def is_below(path: str, folder: Path) -> bool:
    """Return whether an absolute path leads to a regular file below a folder, links resolved."""
    if "\0" in path or not os.path.isabs(path):
        return False
    try:
        real = Path(path).resolve(strict=True)
        return real.is_relative_to(os.path.realpath(folder)) and real.is_file()
    except (OSError, RuntimeError, ValueError):  # absent, a loop of links, no characters of a file name
        return False


def occupied(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


def make_room(folder: Path, limit: int) -> None:
    """Remove the oldest files below a folder, but its lock, until at most `limit` bytes stay."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if path == os.path.join(folder, LOCK):  # by which the next page knows whose folder it is
                continue
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        Path(path).unlink(missing_ok=True)
        total -= size


def bounded_body(receive: Receive, most: int, seconds: float) -> Receive:
    """Return `receive` with a bound on the bytes and the time of a body.

    Args:
        receive: of the request.
        most: bytes, beyond which the answer is 413.
        seconds: beyond which the answer is 408.
    """
    end, taken, whole = time.monotonic() + seconds, 0, False

    async def receiving() -> Message:
        nonlocal taken, whole
        if whole:  # what follows is the wait for the client to go
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, "the upload took too long") from None
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(413, f"the page takes uploads of up to {most >> 20} MiB now")
        whole = not message.get("more_body", False)
        return message

    return receiving


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, then the client's messages."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
