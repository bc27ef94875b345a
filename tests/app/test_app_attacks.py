"""Attacks on the page over HTTP: each is refused, and the page still answers its owner afterwards."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio (davae[app])")

from conftest import picture
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from test_app import pair  # noqa: F401 - a fixture

from davae.app import access as doors
from davae.app import drawing, page, slot
from davae.app.access import Access, HostPort, grant, parse_host, read_auth, same_origin
from davae.app.forms import FormError, escape_markup, line_of
from davae.app.guard import Guard
from davae.app.limits import LOCK, Bounds, make_room, occupied, wrong_call
from davae.app.page import build_server, listen, remove_left_folders, upload_folder
from davae.app.pair import Stopped
from davae.app.roots import RECIPES_OWN, Roots, open_roots
from davae.app.training import Trainings
from davae.app.turns import Turns
from davae.errors import RunError
from davae.recipes import dump_recipe, load_recipe

SECRET = "the victim's words, 6f1e"
OWN = "http://127.0.0.1:7860"
ACCESS = Access(token="t" * 43)
COOKIE = {"Cookie": f"{ACCESS.cookie}={ACCESS.cookie_value}"}


def echo_client(access: Access = ACCESS, folder: Path = Path("/nonexistent"), **options: Any) -> TestClient:
    """A client of the guard around an app that answers every path, so that what arrives has passed the guard."""

    async def echo(request: Any) -> PlainTextResponse:
        body = await request.body()
        return PlainTextResponse(f"passed {request.url.path} {len(body)}")

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT", "DELETE"])])
    guard = Guard(app, access, folder, options.pop("bounds", None))
    return TestClient(guard, base_url=options.pop("base_url", OWN), follow_redirects=False, **options)


FOREIGN_HOSTS = (
    "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example:7860", "evil.localhost",
    "192.168.1.7:7860", "0.0.0.0:7860", "[::2]:7860", "[::ffff:127.0.0.1]:7860", "2130706433", "0x7f000001", "127.1",
    "localhost:0", "localhost:99999", "localhost:", "localhost:80:80", "user@localhost", "localhost/x", "local host",
    "localhost,evil.example", "localhost..", ".localhost", "[::1", "::1", "[::1%eth0]", "", "-",
    "lоcalhost".encode().decode("latin-1"),
)  # fmt: skip
OWN_HOSTS = (
    "localhost", "LOCALHOST:7860", "localhost.", "localhost.:7860", "127.0.0.1", "127.0.0.1:8000", "[::1]:7860",
    "[0:0:0:0:0:0:0:1]", "lab.example:7860", "Lab.Example", "[2001:db8::7]",
)  # fmt: skip


def test_host_kinds():
    access = grant("127.0.0.1", ["lab.example", "2001:db8::7"])
    client = echo_client(access)
    cookie = {"Cookie": f"{access.cookie}={access.cookie_value}"}
    for host in FOREIGN_HOSTS:
        answer = client.get("/config", headers={"Host": host.encode("latin-1"), **cookie})
        assert answer.status_code in (400, 403), host
        assert "passed" not in answer.text
    for host in OWN_HOSTS:
        answer = client.get("/config", headers={"Host": host, **cookie})
        assert answer.text.startswith("passed"), host


def test_two_hosts_no_host_and_a_forwarded_host():
    client = echo_client()
    twice = client.get("/config", headers=[("Host", "localhost"), ("Host", "evil.example"), *COOKIE.items()])
    assert twice.status_code == 400
    unnamed = [(b"cookie", COOKIE["Cookie"].encode())]
    assert raw_status(Guard(PlainTextResponse("passed"), ACCESS, Path("/")), unnamed) == 400
    seen: dict[str, str] = {}

    async def keep(scope: Any, receive: Any, send: Any) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await PlainTextResponse("ok")(scope, receive, send)

    forwarded = {"X-Forwarded-Host": "evil.example", "X-Gradio-Server": "http://evil.example", **COOKIE}
    TestClient(Guard(keep, ACCESS, Path("/")), base_url=OWN).get("/config", headers=forwarded)
    assert "cookie" in seen
    assert not [name for name in seen if "forwarded-host" in name or "gradio" in name]


def raw_status(guard: Any, headers: list[tuple[bytes, bytes]], path: str = "/config", method: str = "GET") -> int:
    """Status of a request with exactly these headers, which no client library would send."""
    import asyncio

    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "headers": headers, "scheme": "http",
        "server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    "origin",
    [
        "null", "http://evil.example", "https://127.0.0.1:7860.evil.example", "http://127.0.0.1:7861", "http://127.0.0.1",
        "https://127.0.0.1:7860x", "http://localhost:7860", "file://", "ftp://127.0.0.1:7860", "127.0.0.1:7860", "",
        "http://127.0.0.1:7860/", "http://127.0.0.1:7860@evil.example", "chrome-extension://abcdef", "http://[::1]:7860",
    ],
)  # fmt: skip
def test_foreign_origins_are_refused(origin: str):
    for method in ("get", "post"):
        answer = getattr(echo_client(), method)(
            "/gradio_api/queue/join" if method == "post" else "/config", headers={"Origin": origin, **COOKIE}
        )
        assert answer.status_code == 403, (method, origin)


def test_own_origins_pass():
    for origin, host in (
        ("http://127.0.0.1:7860", "127.0.0.1:7860"),
        ("http://LOCALHOST:8000", "localhost:8000"),
        ("http://localhost", "localhost"),
        ("https://localhost", "localhost"),  # behind a proxy that ends TLS
        ("https://localhost:443", "localhost"),
        ("http://[::1]:7860", "[::1]:7860"),
    ):
        assert same_origin(origin, parse_host(host) or HostPort("", None)), origin
        headers = {"Origin": origin, "Host": host, **COOKIE}
        assert echo_client().post("/gradio_api/cancel", headers=headers, json={}).status_code == 200


def test_requests_that_another_site_makes_a_browser_send_are_refused():
    client = echo_client()
    for site in ("cross-site", "same-site"):  # same-site: another port of this machine
        for mode, dest in (("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe"), ("navigate", "object")):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest, **COOKIE}
            assert client.get("/", headers=headers).status_code == 403, (site, mode, dest)
            assert client.get("/gradio_api/startup-events", headers=headers).status_code == 403
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/config", headers=visit | COOKIE).status_code == 403
    led = client.get("/", headers=visit)  # without the strict cookie: the page loads itself again, once
    assert (led.status_code, "url=/?again" in led.text) == (401, True)
    assert "refresh" not in client.get("/?again", headers=visit).text


PATHS_OF_ALL = (
    "/", "/config", "/theme.css", "/assets/index.js", "/static/img/logo.svg", "/gradio_api/info", "/reports/first",
    "/gradio_api/file=/etc/passwd", "/gradio_api/queue/data", "/gradio_api/heartbeat/abc", "/gradio_api/startup-events",
    "/favicon.ico", "/gradio_api/upload_progress", "/nothing",
)  # fmt: skip
WRONG_TOKENS = ("", "t", "t" * 42, "t" * 44, "T" * 43, "\u00e9" * 43, ACCESS.cookie_value)


def test_every_path_needs_the_token():
    client = echo_client()
    for path in PATHS_OF_ALL:
        assert client.get(path).status_code == 401, path
        for wrong in WRONG_TOKENS:
            assert client.get(path, params={"token": wrong}).status_code == 401
            encoded = wrong.encode("latin-1", "replace")
            assert client.get(
                path, headers={"Cookie": ACCESS.cookie.encode() + b"=" + encoded}
            ).status_code == 401 or (wrong == ACCESS.cookie_value)
            assert client.get(path, headers={"Authorization": b"Bearer " + encoded}).status_code == 401
        assert client.get(path, headers={"Cookie": f"{ACCESS.cookie}={ACCESS.token}"}).status_code == 401
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/reset"):
        assert client.post(path, json={}).status_code == 401, path


def test_the_first_visit_sets_a_strict_cookie_and_drops_the_token_from_the_address():
    client = echo_client()
    first = client.get("/", params={"token": ACCESS.token})
    assert (first.status_code, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert ACCESS.token not in cookie
    assert client.get("/config").status_code == 200
    bearer = {"Authorization": f"Bearer {ACCESS.token}"}
    assert echo_client().get("/config", headers=bearer).status_code == 200
    assert (
        "Secure"
        in echo_client(base_url="https://localhost").get("/", params={"token": ACCESS.token}).headers["set-cookie"]
    )
    assert ACCESS.token not in repr(ACCESS)
    assert Access().token != Access().token


def test_answers_carry_the_security_headers():
    client = echo_client()
    for answer in (
        client.get("/"),
        client.get("/", headers=COOKIE),
        client.get("/", headers={"Host": "evil.example"}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    apart = client.get("/reports/first", headers=COOKIE).headers["content-security-policy"]
    assert apart.startswith("sandbox")
    assert "allow-same-origin" not in apart


UNLISTED = (
    "/gradio_api/run/predict", "/gradio_api/api/predict", "/gradio_api/call/predict", "/gradio_api/call/v2/predict",
    "/gradio_api/component_server", "/gradio_api/component_server/", "/gradio_api/proxy=http://evil.example/x",
    "/gradio_api/stream/x", "/gradio_api/process_recording", "/gradio_api/vibe-edit", "/gradio_api/vibe-code",
    "/gradio_api/deep_link", "/gradio_api/openapi.json", "/gradio_api/dev/reload", "/gradio_api/file/etc/passwd",
    "/gradio_api/token", "/gradio_api/runs", "/gradio_api/mcp/sse", "/monitoring", "/monitoring/summary", "/login",
    "/logout", "/docs", "/openapi.json", "/custom_component/1/client/component/index.js", "/reports/..", "/reports/a/b",
    "/reports/UP", "//etc/passwd", "/assets/../../etc/passwd", "/gradio_api//queue/join", "/GRADIO_API/queue/join",
)  # fmt: skip


def test_routes_that_the_page_does_not_use_are_closed():
    passed = Guard(PlainTextResponse("passed"), ACCESS, Path("/"))
    headers = [(b"host", b"localhost"), (b"cookie", COOKIE["Cookie"].encode())]
    for path in UNLISTED:
        for method in ("GET", "POST", "HEAD"):
            assert raw_status(passed, headers, path, method) in (403, 404, 405), (method, path)
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "X" * 1000):
        assert raw_status(passed, headers, "/config", method) == 405
    assert raw_status(passed, headers, "/gradio_api/queue/join") == 405
    assert raw_status(passed, headers) == 200


def test_websockets_are_closed():
    from starlette.websockets import WebSocketDisconnect

    for headers in ({}, COOKIE, {"Origin": "http://evil.example", **COOKIE}):
        with (
            pytest.raises(WebSocketDisconnect),
            echo_client().websocket_connect("/gradio_api/queue/join", headers=headers),
        ):
            pass


def test_files_outside_the_folder_of_uploads_are_not_served(tmp_path: Path):
    folder, victim = tmp_path / "up", tmp_path / "victim.txt"
    folder.mkdir()
    victim.write_text(SECRET)
    (folder / "mine.txt").write_text("mine")
    (folder / "link.txt").symlink_to(victim)
    (folder / "loop").symlink_to(folder / "loop")
    client = echo_client(folder=folder)
    for path in (
        str(victim), f"{folder}/../victim.txt", f"{folder}/link.txt", f"{folder}/loop", "victim.txt", "../victim.txt",
        str(folder), "/etc/passwd", "/proc/self/environ", "http://evil.example/x", "file:///etc/passwd", f"{folder}x/a",
        f"{folder}/%2e%2e/victim.txt", f"{folder}/mine.txt%00", f"//{victim}", "~/x", f"{folder}/{'x' * 300}",
    ):  # fmt: skip
        assert client.get(f"/gradio_api/file={path}", headers=COOKIE).status_code in (403, 404), path
    assert client.get(f"/gradio_api/file={folder}/mine.txt", headers=COOKIE).status_code == 200


def test_calls_that_are_not_what_the_page_sends(tmp_path: Path):
    (tmp_path / "mine.png").write_bytes(b"x")
    mine, victim = str(tmp_path / "mine.png"), "/etc/passwd"
    good = {"data": [{"path": mine, "meta": {"_type": "gradio.FileData"}}], "fn_index": 1, "session_hash": "abc"}
    assert wrong_call(json.dumps(good).encode(), tmp_path) == ""
    assert wrong_call(b"", tmp_path) == ""
    records = [
        {"path": victim}, {"path": [victim]}, {"path": {"path": victim}}, {"path": 1}, {"path": "http://evil.example/a.png"},
        {"path": f"{tmp_path}/../{tmp_path.name}x"}, {"path": str(tmp_path)}, {"path": ""}, {"path": "mine.png"},
        {"path": f"{mine}\0"}, {"path": "\ud800"}, {"a": [[{"b": {"path": victim}}]]}, {"path": "file:///etc/passwd"},
    ]  # fmt: skip
    for record in records:
        for place in ({"data": [record]}, {"data": [], "event_data": record}, {"data": [[record]], "fn_index": 0}):
            assert "not uploaded" in wrong_call(json.dumps(place).encode(), tmp_path), record
    bodies = (
        b"{", b"[]", b"1", b'{"data": NaN}', b'{"data": Infinity}', b"\xff\xfe", b'{"session_hash": "a/b"}',
        b'{"session_hash": 5}', json.dumps({"session_hash": "x" * 65}).encode(), b"[" * 100_000,
        b'{"data":' + b"[" * 30 + b"]" * 30 + b"}", b'{"data":' + b"[" * 900 + b"]" * 900 + b"}",
    )  # fmt: skip
    for body in bodies:
        assert wrong_call(body, tmp_path), body[:40]


def test_bounds_on_bodies_uploads_and_room(tmp_path: Path):
    bounds = Bounds(body=100, upload=1000, folder=5000, spare=0)
    client = echo_client(folder=tmp_path, bounds=bounds, headers=COOKIE)
    join, up = "/gradio_api/queue/join", "/gradio_api/upload"
    assert client.post(join, content=b"{}" + b" " * 98).status_code == 200
    assert client.post(join, content=b" " * 101).status_code == 413
    assert client.post(join, content=iter([b" " * 60, b" " * 60])).status_code == 413  # no length announced
    for length in ("x", "-1", "1" * 16, "1e3"):
        assert client.post(join, content=b"{}", headers={"Content-Length": length}).status_code == 400, length
    assert client.post(up, content=b" " * 1000).status_code == 200
    assert client.post(up, content=b" " * 1001).status_code == 413
    assert client.post(up, content=iter([b" " * 600, b" " * 600])).status_code == 413
    (tmp_path / "old").write_bytes(b" " * 4500)
    assert client.post(up, content=b" " * 501).status_code == 507
    assert client.post(up, content=b" " * 499).status_code == 200
    (tmp_path / "new").write_bytes(b" " * 600)
    assert client.post(up, content=b"").status_code == 507
    full = echo_client(folder=tmp_path, bounds=Bounds(spare=2**62), headers=COOKIE)
    assert full.post(up, content=b"").status_code == 507
    for name, age in (("old", 50), ("new", 10)):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / LOCK).touch()
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)  # the oldest, as on a page that has run for long
    make_room(tmp_path, 1000)
    assert (occupied(tmp_path), sorted(p.name for p in tmp_path.iterdir())) == (600, [LOCK, "new"])


def test_too_many_streams_and_uploads_are_refused(tmp_path: Path):
    client = echo_client(folder=tmp_path, bounds=Bounds(streams=0, uploads=0), headers=COOKIE)
    assert client.get("/gradio_api/heartbeat/abc").status_code == 503
    assert client.get("/gradio_api/queue/data").status_code == 503
    assert client.post("/gradio_api/upload", content=b"").status_code == 503


def test_a_body_that_never_comes_is_given_up(tmp_path: Path):
    import asyncio

    sent: list[dict] = []

    async def never() -> dict:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/gradio_api/queue/join", "query_string": b"", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"cookie", COOKIE["Cookie"].encode())], "server": ("127.0.0.1", 1),
    }  # fmt: skip
    asyncio.run(Guard(None, ACCESS, tmp_path, Bounds(seconds=0.01))(scope, never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


# -- who may start it ------------------------------------------------------------------------------------------


def test_other_machines_need_a_password():
    for host in ("0.0.0.0", "::", "192.168.1.7", "gpu.example", "2001:db8::1", "[::]"):
        with pytest.raises(RunError, match=r"--auth user:password"):
            grant(host)
        assert grant(host, auth="a:b").auth == "a:b"
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2", "[::1]", "LOCALHOST"):
        assert grant(host).auth is None
    for host in ("", "http://x", "x:80", "a b", "*", "x/y", "x" * 300):
        with pytest.raises(RunError, match=r"is not a host name"):
            grant("127.0.0.1", [host])
    assert grant("::1").address(7860).startswith("http://[::1]:7860/?token=")
    assert grant("0.0.0.0", auth="a:b").address(7860).startswith("http://127.0.0.1:7860/?token=")


def test_a_page_for_every_address_answers_to_the_one_it_was_reached_at():
    access = grant("0.0.0.0", auth="a:b")
    assert access.answers_to(HostPort("192.168.1.7", 7860), "192.168.1.7")
    assert access.answers_to(HostPort("192.168.1.7", 7860), "::ffff:192.168.1.7")
    assert access.answers_to(HostPort("fe80::1", 7860), "fe80::1%eth0")
    assert not access.answers_to(HostPort("192.168.1.8", 7860), "192.168.1.7")
    assert not access.answers_to(HostPort("192.168.1.8", 7860), None)
    assert not access.answers_to(HostPort("evil.example", 7860), "192.168.1.7")
    assert not grant("127.0.0.1").answers_to(HostPort("127.0.0.2", 7860), "127.0.0.2")


def test_the_password_is_asked_for_besides_the_token(monkeypatch: pytest.MonkeyPatch):
    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr("davae.app.guard.asyncio.sleep", at_once)
    access = Access(token="t", auth="ann:pässword:1")
    cookie = {"Cookie": f"{access.cookie}={access.cookie_value}"}
    client = echo_client(access)

    def basic(text: str) -> dict[str, str]:
        import base64

        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    assert client.get("/config", headers=cookie).status_code == 401
    assert client.get("/config", headers=cookie).headers["www-authenticate"].startswith("Basic")
    assert client.get("/config", headers=basic("ann:pässword:1")).status_code == 401  # no token
    for wrong in ("ann:", "ann:pässword", "bob:pässword:1", ":pässword:1", "ann", ""):
        assert client.get("/config", headers=cookie | basic(wrong)).status_code == 401, wrong
    for header in ("Basic", "Basic ???", "Basic \x80", "Bearer t", "basic" * 5000):
        headers = cookie | {"Authorization": header.encode("latin-1")}  # type: ignore[dict-item]
        assert client.get("/config", headers=headers).status_code == 401
    assert client.get("/config", headers=cookie | basic("ann:pässword:1")).status_code == 200
    crowded = echo_client(access, bounds=Bounds(wrong=0))
    assert crowded.get("/config", headers=cookie | basic("ann:x")).status_code == 429


def test_where_the_password_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "password"
    file.write_text("ann:secret\nmore\n")
    file.chmod(0o644)
    with pytest.raises(RunError, match="others may read"):
        read_auth(None, file)
    file.chmod(0o600)
    assert read_auth(None, file) == "ann:secret"
    assert read_auth(None, None) is None
    for wrong in ("", "ann", "ann:", ":secret", "ann:se\ncret"):
        with pytest.raises(RunError, match="write user:password"):
            read_auth(wrong, None)
    with pytest.raises(RunError, match="given twice"):
        read_auth("a:b", file)
    for content in (b"", b"\xff:\xff\n"):
        file.write_bytes(content)
        with pytest.raises(RunError, match="--auth-file"):
            read_auth(None, file)
    with pytest.raises(RunError, match="cannot be read"):
        read_auth(None, tmp_path / "absent")
    monkeypatch.setenv("DAVAE_APP_AUTH", "a:b")
    doors.private_environment()
    assert "DAVAE_APP_AUTH" not in os.environ


def test_an_address_that_is_taken_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RunError, match=r"--port \d+: Address already in use; use another"):
            listen("127.0.0.1", other.getsockname()[1])


def test_the_printed_address_is_one_line_with_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    served: list[Any] = []
    monkeypatch.setattr(page, "build_server", lambda *arguments: served.append(arguments[2]))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append(sockets[0].getsockname()))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    access = grant()
    page.serve(None, tmp_path, access, port)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[0] == f"http://127.0.0.1:{port}/?token={access.token}"
    assert served == [access, ("127.0.0.1", port)]


def test_a_full_disk_starts_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**29))
    monkeypatch.setattr(Trainings, "_launch", lambda self, name: pytest.fail("started"))
    with pytest.raises(RunError, match="the disk has 512 MiB left; this training needs 1024 MiB"):
        Trainings(tmp_path / "runs").start("first", "micro")
    assert not list((tmp_path / "runs").iterdir())


def test_answers_name_no_folder_and_show_text_as_text():
    error = ValueError(
        "cannot read /home/ann/secret/a.png:\n/tmp/davae-app-x/0/b.png and ~/c/d.png; http://x/y/z stays"
    )
    assert line_of(error) == "cannot read a.png: b.png and d.png; http://x/y/z stays"
    assert len(line_of(ValueError("x" * 5000))) < 500
    assert escape_markup("<b>a</b> ![x](http://e) `c` *d* [e](f)") == (
        r"&lt;b&gt;a&lt;/b&gt; \!\[x\]\(http://e\) \`c\` \*d\* \[e\]\(f\)"
    )


# -- names below roots -----------------------------------------------------------------------------------------

OUTSIDE = (
    "..", ".", "/", "/etc", "../secret", "link", "a/../..", "pipe:id", "pipe:touch x", "http://evil.example/x.tar",
    "hf://datasets/x", "openmoji-all", "someone/dataset", "~", "{1..9}.tar", "*.tar", "", "\0", "notes.txt", "a\nb", None,
    5, ["set"], {"path": "set"}, True,
)  # fmt: skip


def test_only_names_below_the_roots(tmp_path: Path):
    root, outside = tmp_path / "root", tmp_path / "secret"
    for folder in (root / "set", root / "bad name;rm", root / "pipe:id", root / ".hidden", outside):
        folder.mkdir(parents=True)
    for name in ("shard.tar", "notes.txt", "{1..9}.tar"):
        (root / name).touch()
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to(root / "set")
    for folder in (root / "model", root / "run" / "pipeline", outside / "pipeline"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text("{}")
    roots = Roots(root, root, "micro")
    assert roots.data_names() == [RECIPES_OWN, "inner", "model", "run", "set", "shard.tar"]
    assert roots.data_source("set") == str(root / "set")
    assert roots.data_source(RECIPES_OWN) is None
    assert {"micro", "model", "run", "sd35-medium"} <= set(roots.model_names())
    assert roots.model_source("run") == str(root / "run" / "pipeline")
    assert roots.model_source("model") == str(root / "model")
    assert roots.model_source("micro") == "micro"
    for name in OUTSIDE:
        with pytest.raises(FormError, match="is not a choice"):
            roots.data_source(name)
        with pytest.raises(FormError, match="is not a choice"):
            roots.model_source(name)
    assert Roots().data_names() == [RECIPES_OWN]
    with pytest.raises(RunError, match=r"--data-root: .* is not a folder"):
        open_roots(root / "absent", None)


# -- the page itself -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:  # noqa: F811
    """The real page behind its guard, and the same page as Gradio alone would serve it."""
    trainings = Trainings(tmp_path_factory.mktemp("runs"))
    guard = build_server(pair, trainings, ACCESS)
    with TestClient(guard, base_url=OWN, headers=COOKIE) as client:
        bare = TestClient(guard.app, base_url=OWN)
        bare.portal = client.portal  # one event loop: Gradio's queue lives in it
        page = guard.app.routes[-1].app.get_blocks()  # type: ignore[attr-defined]
        yield SimpleNamespace(client=client, bare=bare, page=page, trainings=trainings)


def fire(client: TestClient, calls: list[tuple[int, list[Any]]], session: str) -> list[dict[str, Any]]:
    """Call handlers as the page's scripts do, a few at a time; the last message of each."""
    done: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    for start in range(0, len(calls), 20):
        for index, data in calls[start : start + 20]:
            joined = client.post(
                "/gradio_api/queue/join", json={"data": data, "fn_index": index, "session_hash": session}
            )
            assert joined.status_code == 200, joined.text
            order.append(joined.json()["event_id"])
        text = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
        messages = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        done |= {m["event_id"]: m for m in messages if m["msg"] == "process_completed"}
    return [done[event] for event in order]


def endpoints(page: Any) -> list[tuple[int, Any, list[Any]]]:
    """Every handler with an input: its number, itself, and what the page would send at first."""
    return [(index, fn, [part.value for part in fn.inputs]) for index, fn in page.fns.items() if fn.inputs]


def test_no_endpoint_copies_a_file_of_the_server(served: SimpleNamespace, tmp_path: Path):
    """A file record in each argument of each handler, with the guard and with Gradio's own check alone."""
    victim = tmp_path / "victim.png"
    victim.write_text(SECRET)
    record = {"path": str(victim), "meta": {"_type": "gradio.FileData"}, "orig_name": "victim.png"}
    calls = []
    for index, fn, values in endpoints(served.page):
        for place, part in enumerate(fn.inputs):
            if not part.stateful:  # the server keeps those, and reads nothing of what is sent
                wrapped = [record] if (index + place) % 2 else record
                calls.append((index, [wrapped if number == place else value for number, value in enumerate(values)]))
    assert len(calls) > 40
    for index, data in calls:
        call = {"data": data, "fn_index": index, "session_hash": "abc"}
        answer = served.client.post("/gradio_api/queue/join", json=call)
        assert (answer.status_code, "not uploaded" in answer.text) == (400, True)  # not for its number of arguments
    assert not [answer for answer in fire(served.bare, calls, "bare") if answer["success"]]
    copies = [p for p in upload_folder().rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert copies == []
    assert not list(served.trainings.root.iterdir())


def test_gradios_own_check_of_file_arguments_is_on(served: SimpleNamespace):
    assert served.page.has_launched  # set by `build`, so however the page is served
    assert served.page.allowed_paths == []


def test_real_uploads_still_work(served: SimpleNamespace):
    buffer = io.BytesIO()
    picture(1, 50, 40).save(buffer, "PNG")
    sent = served.client.post("/gradio_api/upload", files={"files": ("photo.png", buffer.getvalue())})
    assert sent.status_code == 200
    record = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": "photo.png"}
    index, values = next((i, v) for i, fn, v in endpoints(served.page) if fn.inputs[0].elem_id == "photo")
    (answer,) = fire(served.client, [(index, [record, *values[1:]])], "photo")
    assert answer["success"], answer
    assert "dB" in json.dumps(answer["output"])
    shown = re.search(r"/gradio_api/file=([^\"]+)", json.dumps(answer["output"]))
    assert shown is not None
    assert served.client.get(f"/gradio_api/file={shown[1]}").status_code == 200
    assert "sandbox" in served.client.get(f"/gradio_api/file={shown[1]}").headers["content-security-policy"]


HOSTILE_VALUES = (
    None, True, -1, 10**400, 1e308, "", "x" * 5000, "../../etc/passwd", "pipe:id", "<img src=x onerror=alert(1)>", [], {},
    ["a"] * 1000, {"a": 1}, "\0", "stage1.max_steps=1",
)  # fmt: skip


def test_every_handler_checks_its_own_arguments(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """Called past Gradio: an answer or one line, whatever an argument is; nothing out of bounds is started."""
    import gradio as gr

    monkeypatch.setattr(Trainings, "_launch", lambda self, name: None)
    monkeypatch.setattr("davae.app.drawing.draw", lambda *args, **options: iter(()))
    monkeypatch.setattr("davae.app.inspect_tab.inspection", lambda *args: ([], "inspected"))
    tried = 0
    for _, fn, values in endpoints(served.page):
        function = inspect.unwrap(fn.fn)
        if "request" in inspect.signature(function).parameters:
            values = [*values, SimpleNamespace(session_hash="x")]
        for place, part in enumerate(fn.inputs):
            if part.stateful:
                continue
            for value in HOSTILE_VALUES:
                data = [value if number == place else known for number, known in enumerate(values)]
                tried += 1
                try:
                    answer = fn.fn(*data)
                    answer = list(answer) if inspect.isgenerator(answer) else answer
                except gr.Error as error:
                    answer = str(error)
                assert str(served.trainings.root) not in str(answer)
                assert len(str(answer)) < 20_000
    assert tried > 500
    for name in served.trainings.names():
        recipe = load_recipe(str(served.trainings.root / name / "recipe.yaml"))
        assert (recipe.data.source, recipe.name) == ("openmoji", "micro")
        assert max(recipe.stage1.batch_size, recipe.stage2.batch_size) <= 256
        shutil.rmtree(served.trainings.root / name)


def test_reports_come_from_the_run_root_alone(served: SimpleNamespace, tmp_path: Path):
    root = served.trainings.root
    (tmp_path / "secret.html").write_text(SECRET)
    for name in ("first", "linked"):
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text("kind: upgrade")
    (root / "first" / "report.html").write_text("<p>mine</p>")
    (root / "linked" / "report.html").symlink_to(tmp_path / "secret.html")
    try:
        assert "mine" in served.client.get("/reports/first").text
        for name in ("linked", "absent", "..", "%2e%2e", "first/../linked", "first%00"):
            answer = served.client.get(f"/reports/{name}")
            assert SECRET not in answer.text, name
            assert answer.status_code in (401, 404) or "mine" in answer.text or answer.url.path == "/"
    finally:
        for name in ("first", "linked"):
            for file in (root / name).iterdir():
                file.unlink()
            (root / name).rmdir()


def test_folders_of_killed_pages_are_removed_and_those_of_living_ones_kept(tmp_path: Path):
    import fcntl

    for name in ("davae-app-dead", "davae-app-alive", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".in-use").touch()
    with (tmp_path / "davae-app-alive" / ".in-use").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_left_folders(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["davae-app-alive", "other"]
    assert upload_folder().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "paused: no step logged yet"),
        ("davae: stopped by SIGTERM, saved; run the same command again to go on\n", "paused: no step logged yet"),
        ("davae: /home/ann/data/x.tar does not exist\n", "stopped: davae: x.tar does not exist"),
    ],
)
def test_how_a_training_of_an_earlier_page_ended(tmp_path: Path, log: str, line: str):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.yaml").write_text(dump_recipe(load_recipe("micro")))
    (tmp_path / "first" / "output.txt").write_text(log)
    assert Trainings(tmp_path).state("first").line == line


def test_the_slot_outlives_its_page(tmp_path: Path):
    """The lock belongs to the training that inherited the file; a second one is refused while it lives."""
    import subprocess
    import sys

    with slot.taken(tmp_path, "first") as held:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()", "davae", "first"],
            stdin=subprocess.PIPE,
            pass_fds=[held.fileno()],
        )
        slot.write(held, "first", child.pid)
    try:  # the page has closed its file
        trainings = Trainings(tmp_path)
        assert slot.holder(tmp_path) == slot.Holder("first", child.pid)
        assert trainings.current() == "first"
        assert trainings.running("first")
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "recipe.yaml").write_text("kind: upgrade")
        with pytest.raises(RunError, match="'first' runs; pause it first"):
            trainings.resume("first")
        with pytest.raises(RunError, match="another training runs"), slot.taken(tmp_path, "second"):
            pass
        assert not slot.asks_to_stop(os.getpid(), tmp_path / "elsewhere-entirely")
        trainings.close(1)  # this page ends; it did not start the training
        assert child.poll() is None
        trainings.pause("first")
        assert child.wait(10) == -15
    finally:
        child.kill()
        child.wait()
        child.stdin.close()  # type: ignore[union-attr]
    assert trainings.current() == ""
    assert not trainings.running("first")


# -- stop ------------------------------------------------------------------------------------------------------


def handlers_of(page: Any, button: str) -> list[Any]:
    """The functions that a button calls."""
    return [
        fn
        for fn in page.fns.values()
        if any(part in page.blocks and page.blocks[part].elem_id == button for part, _ in fn.targets)
    ]


def test_a_stop_that_is_handled_late_ends_no_newer_drawing(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """Gradio may call `end` after a newer drawing has begun: what counts is the order in which the requests arrived."""

    def draw(*args: Any, stop: Any, **options: Any) -> Iterator[Any]:
        for _ in range(3):
            if stop.is_set():
                raise Stopped
            yield drawing.DrawnImage("upgraded", picture(0, 8, 8), 8, 1, 0.1)

    monkeypatch.setattr(drawing, "draw", draw)
    (run,), (end,) = handlers_of(served.page, "draw"), handlers_of(served.page, "stop-drawing")
    values = [part.value for part in run.inputs]

    def asked(arrival: int, visitor: str = "one") -> SimpleNamespace:
        return SimpleNamespace(session_hash=visitor, headers={"x-davae-arrival": str(arrival)})

    def status(answers: Iterator[dict]) -> list[str]:
        return [value for answer in answers for part, value in answer.items() if part.elem_id == "draw-status"]

    stopped, other, newer = (run.fn(*values, asked(n, v)) for n, v in ((1, "one"), (2, "two"), (4, "one")))
    for begun in (stopped, other, newer):
        next(begun), next(begun)
    late = end.fn(asked(3))
    assert late != "Stopped."  # the newer drawing's line stays
    assert status(stopped)[-1] == "Stopped."
    assert status(newer)[-1] == "Done."
    assert status(other)[-1] == "Done."
    waiting = run.fn(*values, asked(5))  # in the queue while the Stop arrives
    assert end.fn(asked(6)) == "Stopped."
    assert status(waiting) == ["Waiting for the model.", "Stopped."]
    assert status(run.fn(*values, asked(7)))[-1] == "Done."
    end.fn(asked(10**12, "through-the-guard"))  # later than what is asked for now, by the numbers of the guard
    for visitor, line in (("through-the-guard", "Stopped."), ("another", "Done.")):
        (answer,) = fire(served.client, [(run._id, values)], visitor)
        assert line in json.dumps(answer["output"])
    assert not end.cancels  # Gradio would end a newer drawing too, and close the page's stream
    assert run.trigger_mode == "always_last"  # a click while a stopped drawing ends is not lost


def test_the_guard_numbers_requests_in_their_order():
    seen = []

    async def keep(scope: Any, receive: Any, send: Any) -> None:
        seen.append([value for name, value in scope["headers"] if name == b"x-davae-arrival"])
        await PlainTextResponse("ok")(scope, receive, send)

    client = TestClient(Guard(keep, ACCESS, Path("/")), base_url=OWN)
    for forged in ("0", "999999999"):
        client.get("/config", headers={"X-Davae-Arrival": forged, **COOKIE})
    assert [len(numbers) for numbers in seen] == [1, 1]
    assert int(seen[0][0]) < int(seen[1][0]) < 999999999


def test_stops_of_many_visitors_take_bounded_memory():
    turns = Turns()
    for number in range(3000):
        turns.stop(str(number), number)
        turns.begin(str(number), number)
        turns.end(str(number), number)
    assert len(turns._stopped) <= 1024
    assert not turns._begun


def test_a_system_without_the_locks_of_unix_is_one_line(monkeypatch: pytest.MonkeyPatch):
    from davae.commands.app import app_verb

    monkeypatch.setitem(sys.modules, "fcntl", None)  # an import of it fails, as on Windows
    with pytest.raises(RunError, match="the page needs Linux or macOS"):
        app_verb("micro")


WRONG_CALLS = (
    (b'{"fn_index": -1, "data": []}', "calls nothing"), (b'{"fn_index": 999999, "data": []}', "calls nothing"),
    (b'{"fn_index": true, "data": []}', "calls nothing"), (b'{"fn_index": 1e400, "data": []}', "calls nothing"),
    (b'{"fn_index": "1", "data": []}', "calls nothing"), (b'{"data": []}', "calls nothing"),
    (b'{"fn_index": 1, "data": []}', "number of arguments"), (b'{"fn_index": 1, "data": {"0": 1}}', "number of arguments"),
    (b'{"fn_index": 1}', "number of arguments"), (b'{"fn_index": 1, "data": [1, 2]}', "number of arguments"),
    (b'{"fn_index": 1, "data": [1e999]}', "not finite"), (b'{"fn_index": 1, "data": [[{"a": -1e999}]]}', "not finite"),
    (b'{"fn_index": 1, "data": ["\\ud800"]}', "not text"), (b'{"fn_index": 1, "data": [{"\\udfff": 1}]}', "not text"),
)  # fmt: skip


@pytest.mark.parametrize(("body", "line"), WRONG_CALLS)
def test_calls_that_gradio_would_fail_at_are_refused(tmp_path: Path, body: bytes, line: str):
    assert line in wrong_call(body, tmp_path, {1: 1})
    assert wrong_call('{"fn_index": 1, "data": ["\\ud83d\\ude00 \u00fc"]}'.encode(), tmp_path, {1: 1}) == ""


def test_the_page_answers_calls_of_no_handler_and_addresses_of_many_fields(served: SimpleNamespace):
    """Each was an error 500 with a traceback in the log."""
    for number, data in ((-1, []), (99_999, []), (0, [1] * 50)):
        call = {"data": data, "fn_index": number, "session_hash": "a"}
        assert served.client.post("/gradio_api/queue/join", json=call).status_code == 400
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"):
        for body in (b'{"a": 1e999}', b'{"a": "\\ud800"}'):
            assert served.client.post(path, content=body).status_code == 400
    many = "&".join(f"a{number}=1" for number in range(150))
    assert served.client.get(f"/config?{many}").status_code == 400
    assert echo_client().get(f"/?{many}").status_code == 400  # without the token
