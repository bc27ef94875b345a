"""The page in a real headless Chromium. Its screenshots stay in `runs/screenshots`, to be looked at.

Needs Debian's `chromium` (apt-get install chromium) or another on the path; skipped without.
"""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import picture, tiny_upgrade_recipe
from test_app import HOSTILE

from davae.app.access import Access

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium on the path (Debian: apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser (davae[dev])")
pytest.importorskip("gradio", reason="the page needs Gradio (davae[app])")
expect = playwright.expect

SHOTS = Path(__file__).resolve().parents[2] / "runs" / "screenshots"
REBOUND = "--host-resolver-rules=MAP rebound.example 127.0.0.1"  # what an attacker's DNS answers the second time
OPEN = "--disable-features=LocalNetworkAccessChecks"  # newer browsers ask before a site reaches this machine
SECONDS = 240_000  # milliseconds that a step may take on a busy machine


ACCESS = Access()
HTML = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
ANSWERS: list[tuple[str, str, int]] = []  # host, path and status of every answer of the page


def recorded(app: Any) -> Any:
    """An ASGI app that keeps what it answers."""

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                host = dict(scope["headers"]).get(b"host", b"").decode()
                ANSWERS.append((host, scope["path"], message["status"]))
            await send(message)

        await app(scope, receive, sending)

    return recording


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, picture_folder: Path) -> str:
    """A recipe that trains in seconds, offered by the page as if it were shipped."""
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    changes = {"run__checkpoint_every": 1000}
    recipe.write_text(yaml.safe_dump(tiny_upgrade_recipe(tiny_base, picture_folder, **changes)))
    return str(recipe)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Iterator[str]:
    """The page of the embedded model, served from this process."""
    import uvicorn

    from davae.app import train_tab
    from davae.app.page import build_server
    from davae.app.pair import open_pair
    from davae.app.roots import Roots
    from davae.app.training import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("trainings"))
    root = tmp_path_factory.mktemp("data")
    (root / "set").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tab, "upgrade_recipes", lambda: ["micro", tiny])
        guard = build_server(open_pair("micro"), trainings, ACCESS, Roots(root, None, "micro"))
    server = uvicorn.Server(uvicorn.Config(recorded(guard), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    trainings.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", REBOUND, OPEN])
        yield chromium
        chromium.close()


def open_page(browser: Any, address: str, width: int = 1280) -> Any:
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.set_default_timeout(SECONDS)
    page.foreign, page.errors = [], []
    page.on("request", lambda request: page.foreign.append(request.url) if leaves(request.url, address) else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{address}/?token={ACCESS.token}")
    assert page.url == f"{address}/"  # the token is not left in the address
    page.wait_for_selector("#draw")
    return page


def leaves(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def set_number(page: Any, field: str, value: str) -> None:
    page.fill(f"{field} input[type=number]", value)
    page.keyboard.press("Tab")


def says(page: Any, place: str, text: str) -> None:
    expect(page.locator(place)).to_contain_text(re.compile(text), timeout=SECONDS)


def shot(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def source_of(page: Any, place: str) -> str:
    return page.locator(f"{place} img").first.get_attribute("src")


def test_a_prompt_three_pictures_and_a_slider(browser: Any, address: str):
    page = open_page(browser, address)
    page.fill("#prompt textarea, #prompt input", "a green apple")
    set_number(page, "#steps", "6")
    page.click("#draw")
    says(page, "#draw-status", "Done")
    for number, (tokens, size) in enumerate(((64, "64 px, enlarged to 128"), (256, "128 px"), (64, "128 px"))):
        says(page, f"#note-{number}", rf"{size} · {tokens} tokens · [\d.]+ s")
        assert page.locator(f"#drawn-{number} img").first.evaluate("image => image.naturalWidth") == 128
    page.locator("#drawn-slider").scroll_into_view_if_needed()
    box = page.locator("#drawn-slider").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    before = page.locator("#drawn-slider").screenshot()
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 100, middle[1], steps=5)
    page.mouse.up()
    assert page.locator("#drawn-slider").screenshot() != before
    shot(page, "generate")
    set_number(page, "#steps", "150")
    page.click("#draw")
    says(page, "#draw-status", "Drawing .*: step")
    assert page.locator(".progress-text, .progress-level, .eta-bar").count() == 0  # nothing covers the images
    page.click("#stop-drawing")
    says(page, "#draw-status", "Stopped")
    set_number(page, "#steps", "1")
    page.click("#draw")
    says(page, "#draw-status", "Done")
    page.fill("#prompt textarea, #prompt input", "")
    page.click("#draw")
    says(page, "#draw-status", "the model needs a prompt")
    assert page.foreign == []
    page.context.close()


def test_a_photo_its_detail_faded_and_hostile_uploads(browser: Any, address: str, tmp_path: Path):
    picture(0, 300, 260).save(tmp_path / "photo.png")
    page = open_page(browser, address)
    page.get_by_role("tab", name="Reconstruct").click()
    upload = "#photo input[type=file]"
    page.set_input_files(upload, tmp_path / "photo.png")
    says(page, "#reconstruction-note", r"photo\.png.* upgraded [\d.]+ dB, base \+ bicubic [\d.]+ dB")
    full = source_of(page, "#reconstructed")
    set_number(page, "#strength", "0")
    page.wait_for_function("old => document.querySelector('#reconstructed img').src !== old", arg=full)
    shot(page, "reconstruct")
    for name, (content, line) in HOSTILE.items():
        if name == "large.png":  # refused by the server while it arrives, in its own words
            continue
        (tmp_path / name).write_bytes(content)
        page.locator("#photo").get_by_label(re.compile("clear|remove", re.IGNORECASE)).first.click()
        page.set_input_files(upload, tmp_path / name)
        says(page, "#reconstruction-note", f"{re.escape(name)}:? {line}")
    shot(page, "refused")
    page.locator("#photo").get_by_label(re.compile("clear|remove", re.IGNORECASE)).first.click()
    page.set_input_files(upload, tmp_path / "photo.png")
    says(page, "#reconstruction-note", r"photo\.png.* dB")  # the server still works
    page.context.close()


def test_inspect_shows_the_bound(browser: Any, address: str):
    page = open_page(browser, address)
    page.get_by_role("tab", name="Inspect").click()
    page.click("#inspect")
    says(page, "#bound", "64 tokens instead of 256")
    for wrong, named in (("no-such-model", "no-such-model"), ("/etc", "etc"), ("../..", "../.."), (HTML, HTML[:40])):
        page.fill("#inspected input", wrong)
        page.keyboard.press("Enter")
        page.click("#inspect")
        says(page, "#bound", f"model: '{re.escape(named)}.* is not a choice")
    assert page.evaluate("window.hacked") is None
    shot(page, "inspect")
    page.context.close()


def test_a_training_starts_and_pauses(browser: Any, address: str, tiny: str):
    page = open_page(browser, address)
    page.get_by_role("tab", name="Train").click()
    page.fill("#training-name textarea, #training-name input", "by-browser")
    for field, wrong in (("#recipe", "/etc/hosts.yaml"), ("#training-data", "pipe:touch /tmp/x")):
        right = page.input_value(f"{field} input")
        page.fill(f"{field} input", wrong)
        page.keyboard.press("Enter")
        page.click("#start-training")
        says(page, "body", "is not a choice; use")
        page.locator(".toast-close").first.click()
        page.fill(f"{field} input", right)
        page.keyboard.press("Enter")
    page.fill("#recipe input", tiny)
    page.keyboard.press("Enter")
    set_number(page, "#steps-1", "20000")
    page.click("#start-training")
    says(page, "#training-state", r"by-browser running: stage 1, detail VAE: step \d+ of 20000")
    page.wait_for_selector("#curve-0 canvas, #curve-0 svg.marks")
    other = open_page(browser, address)  # a page that did not start it finds it, and can pause it
    other.get_by_role("tab", name="Train").click()
    says(other, "#training-state", r"by-browser running")
    other.click("#pause-training")
    says(other, "#training-state", r"by-browser paused")
    other.context.close()
    says(page, "#training-state", r"by-browser paused: stage 1, detail VAE: step \d+")
    says(page, "#checkpoint", r"stage 1, step \d+")  # its pictures, drawn from the checkpoint that the pause wrote
    assert page.foreign == []
    shot(page, "train")
    page.context.close()


def test_what_visitors_write_is_shown_as_text(browser: Any, address: str, tmp_path: Path):
    page = open_page(browser, address)
    page.fill("#prompt textarea, #prompt input", HTML + "x" * 500)
    page.evaluate("document.querySelector('#prompt textarea, #prompt input').removeAttribute('maxlength')")
    page.fill("#prompt textarea, #prompt input", HTML + "x" * 500)
    page.click("#draw")
    says(page, "#draw-status", "characters; the page takes up to 500")
    name = "a<img src=x onerror=window.hacked=1>![](http:evil.example).png"
    (tmp_path / name).write_bytes(b"words")
    page.get_by_role("tab", name="Reconstruct").click()
    page.set_input_files("#photo input[type=file]", tmp_path / name)
    says(page, "#reconstruction-note", "is not an image that can be read")
    page.get_by_role("tab", name="Train").click()
    page.fill("#training-name textarea, #training-name input", HTML)
    page.click("#start-training")
    says(page, "body", "is not a name for a training")
    assert page.locator("#training-state img, #reconstruction-note img").count() == 0
    assert page.evaluate("window.hacked") is None
    assert page.foreign == []
    page.context.close()


ATTACK = """async (address) => {
  const asked = [];
  const body = JSON.stringify({data: [], fn_index: 0, session_hash: "evil"});
  for (const path of ["/", "/config", "/gradio_api/startup-events", "/gradio_api/queue/data?session_hash=evil",
                      "/gradio_api/heartbeat/evil", "/gradio_api/file=/etc/passwd", "/reports/by-browser"])
    for (const mode of ["no-cors", "cors"])
      asked.push(fetch(address + path, {mode, credentials: "include"}).catch(() => null));
  for (const path of ["/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/upload", "/gradio_api/run/predict"])
    for (const mode of ["no-cors", "cors"])
      asked.push(fetch(address + path, {method: "POST", mode, credentials: "include", body,
                                        headers: {"Content-Type": "text/plain"}}).catch(() => null));
  const add = (tag, attributes) => new Promise(done => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.onload = element.onerror = done;
    document.body.append(element);
    setTimeout(done, 2000);
  });
  asked.push(add("img", {src: address + "/gradio_api/file=/etc/passwd"}), add("iframe", {src: address + "/"}),
             add("script", {src: address + "/config"}));
  try { new EventSource(address + "/gradio_api/queue/data?session_hash=evil"); } catch {}
  try { new WebSocket(address.replace("http", "ws") + "/gradio_api/queue/join"); } catch {}
  await Promise.all(asked);
}"""


def test_other_sites_get_nothing(browser: Any, address: str):
    """A page of another name (its own server, and a name rebound to this machine) in a browser that has the cookie."""
    page = open_page(browser, address)
    port = address.rpartition(":")[2]
    page.route("http://evil.example/", lambda route: route.fulfill(body="<body>evil", content_type="text/html"))
    page.goto("http://evil.example/")
    ANSWERS.clear()
    page.evaluate(ATTACK, address)
    foreign = [a for a in ANSWERS if a[0] == f"127.0.0.1:{port}" and not a[1].startswith("/assets")]
    assert len(foreign) > 20
    assert {status for _, _, status in foreign} <= {401, 403}
    ANSWERS.clear()
    for path in ("/", "/config", f"/?token={ACCESS.token}", "/gradio_api/info"):
        assert page.goto(f"http://rebound.example:{port}{path}").status == 403
    page.evaluate(ATTACK, f"http://rebound.example:{port}")
    rebound = [answer for answer in ANSWERS if answer[0] == f"rebound.example:{port}"]
    assert len(rebound) > 20
    assert {status for _, _, status in rebound} == {403}
    page.goto(address)  # the owner comes back by a link of another site
    page.wait_for_selector("#draw")
    stranger = browser.new_context().new_page()
    assert stranger.goto(address).status == 401
    assert stranger.goto(f"{address}/?token=wrong").status == 401
    page.context.close()
    stranger.context.close()


def test_the_page_opens_with_examples(browser: Any, address: str):
    """No wall of empty boxes, at any width and in the dark; previews while the upgrade is drawn."""
    for name, width, query in (("wide", 1280, ""), ("narrow", 390, ""), ("dark", 1280, "?__theme=dark")):
        page = open_page(browser, address, width)
        page.goto(f"{address}/{query}")
        page.wait_for_selector("#draw")
        says(page, "#draw-status", "An example, a red rose")
        says(page, "#note-2", "64 tokens")
        shot(page, f"{name}-generate")
        for tab, place, words in (
            ("Reconstruct", "#reconstruction-note", "Example rose.* dB"),
            ("Enlarge", "#enlarge-status", "times as long"),
            ("Inspect", "#bound", "before anything is trained"),
            ("Train", "#training-state", "."),
        ):
            page.get_by_role("tab", name=tab).click()
            says(page, place, words)
            if tab == "Enlarge":
                page.wait_for_selector("#enlarge-input img")
                set_number(page, "#enlarge-steps", "4")
                page.click("#enlarge")
                says(page, "#enlarge-status", "128x128 pixels from 1 window")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, tab)
            shot(page, f"{name}-{tab.lower()}")
        assert page.foreign == []
        assert page.errors == []
        page.context.close()
    page = open_page(browser, address)
    page.get_by_role("gridcell", name="a blue fish").or_(page.get_by_text("a blue fish", exact=True)).first.click()
    page.wait_for_function("document.querySelector('#prompt textarea, #prompt input').value === 'a blue fish'")
    page.click("#draw")
    says(page, "#note-2", "preview after step")
    shot(page, "preview")
    says(page, "#draw-status", "Done")
    page.context.close()


def test_three_visitors_at_once(browser: Any, address: str):
    pages = [open_page(browser, address, width) for width in (1280, 900, 390)]
    for number, page in enumerate(pages):
        page.fill("#prompt textarea, #prompt input", ["a pizza", "a red rose", "a blue fish"][number])
        set_number(page, "#steps", "4")
    for page in pages:
        page.click("#draw")
    for page in pages:
        says(page, "#draw-status", "Done")
    assert len({source_of(page, "#drawn-2") for page in pages}) == 3
    shot(pages[2], "phone")
    for page in pages:
        page.context.close()
