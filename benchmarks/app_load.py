"""Load test of `davae app`: clients that work, clients that attack, memory before and after.

    python benchmarks/app_load.py --clients 20 --requests 100 --images 200

Starts `davae app` with the embedded model on this machine alone, as a user would. Each client sends its requests one after
another, hostile ones mixed in; a visitor opens the page once a second. Then images are drawn, some to warm up and
the rest between two readings of the resident memory. An attack gets through where its answer is 200 or holds the
victim's words.
A record of a file lies among as many arguments as its handler takes, so that it is refused as a file and not by count.
Writes docs/results/security/app.json.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SECRET = "the victim's words, 81c0"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "security" / "app.json"
API = "/gradio_api"
RECORDS = "file record in an argument"
REASONS = {RECORDS: "names a file that was not uploaded"}  # kind of attack -> words of its refusal


class Page:
    """The address of a page that runs, and its process."""

    def __init__(self, origin: str, token: str, process: subprocess.Popen, victim: Path):
        self.origin, self.token, self.process, self.victim = origin, token, process, victim

    @contextmanager
    def owner(self) -> Iterator[httpx.Client]:
        """Give a client that came with the token and keeps its cookie."""
        with httpx.Client(base_url=self.origin, follow_redirects=True, timeout=300) as client:
            client.get("/", params={"token": self.token}).raise_for_status()
            yield client

    def handlers(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the number of each handler that takes arguments, and their first values by name."""
        with self.owner() as client:
            config = client.get("/config").json()
        parts = {part["id"]: part["props"] for part in config["components"]}

        def named(ids: list[int]) -> dict[str, Any]:
            return {str(parts[i].get("elem_id") or parts[i].get("label") or i): parts[i].get("value") for i in ids}

        return [(d["id"], named(d["inputs"])) for d in config["dependencies"] if d["inputs"]]

    def resident(self) -> float:
        """Return the resident memory of the page's process in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """Start `davae app`, yield its page, and end it."""
    victim = folder / "victim.png"
    victim.write_text(SECRET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "davae", "app", "micro", "--port", str(port), "--runs", str(folder / "runs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        origin, _, token = line.partition("/?token=")
        for _ in range(100):
            try:
                httpx.get(origin)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield Page(origin, token, process, victim)
    finally:
        process.terminate()
        process.wait(60)


def record(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


def attacks(served: Page) -> dict[str, list[Callable[[httpx.Client], httpx.Response]]]:
    """Return attacks by kind, made with the owner's cookie unless the kind excludes it."""
    join, victim, port = f"{API}/queue/join", str(served.victim), served.origin.rpartition(":")[2]
    call = {"fn_index": 0, "session_hash": "evil"}
    hosts = (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "192.168.0.9",
        "0.0.0.0",
        "[::2]",
        "2130706433",
    )
    origins = (
        "null",
        "http://evil.example",
        f"http://evil.example:{port}",
        "http://127.0.0.1:3000",
        f"https://127.0.0.1:{port}.x",
    )
    files = (
        victim,
        "/etc/passwd",
        "/proc/self/environ",
        f"{victim}/../victim.png",
        "http://127.0.0.1:1/x",
        "file:///etc/passwd",
    )
    wraps = (lambda r: r, lambda r: [r], lambda r: {"data": [r]})
    forged = [
        {
            "fn_index": number,
            "session_hash": "evil",
            "data": [w(record(f)) if n == name else v for n, v in values.items()],
        }
        for number, values in served.handlers()
        for name in values
        for f in files
        for w in wraps
    ]
    closed = (
        "run/predict",
        "call/predict",
        "component_server",
        "proxy=http://127.0.0.1:1/",
        "deep_link",
        "vibe-code",
        "file/etc/passwd",
    )
    bodies = (
        b"{",
        b"[]",
        b"[" * 50_000,
        b'{"data": NaN}',
        b"\xff",
        json.dumps({**call, "session_hash": "../x"}).encode(),
    )
    return {
        "foreign Host": [lambda c, h=h: c.get("/config", headers={"Host": h}) for h in hosts],
        "foreign Origin": [lambda c, o=o: c.post(join, json={**call, "data": []}, headers={"Origin": o}) for o in origins],
        "subrequest of another site": [
            lambda c, s=s: c.get("/config", headers={"Sec-Fetch-Site": s, "Sec-Fetch-Mode": "no-cors"})
            for s in ("cross-site", "same-site")
        ],
        "no token or a wrong one": [
            lambda c, p=p, t=t: httpx.get(f"{served.origin}{p}", params={"token": t} if t else None)
            for p in ("/", "/config", f"{API}/info", f"{API}/queue/data", "/reports/x", "/assets/x")
            for t in ("", "x" * 43)
        ],
        "path outside the folder of uploads": [lambda c, f=f: c.get(f"{API}/file={f}") for f in files],
        RECORDS: [lambda c, f=f: c.post(join, json=f) for f in forged],
        "closed route": [
            lambda c, r=r, m=m: c.request(m, f"{API}/{r}") for r in closed for m in ("GET", "POST")
        ],
        "damaged or oversized call": [
            *(lambda c, b=b: c.post(join, content=b) for b in bodies),
            lambda c: c.post(join, content=b" " * (2**20 + 1)),
        ],
        "oversized upload": [
            lambda c: c.post(f"{API}/upload", files={"files": ("x.png", b"\0" * (21 * 2**20))}),
        ],
    }  # fmt: skip


FREQUENT = 20  # times as often as the upload of 21 MiB


def work(
    served: Page, number: int, requests: int, counts: dict[str, Counter], seconds: list[float], lock: Any
) -> None:
    """One client: half of its requests are those of a visitor, half are attacks."""
    chosen = random.Random(number)
    kinds = attacks(served)
    names = [kind for kind in kinds for _ in range(1 if kind == "oversized upload" else FREQUENT)]
    honest = ("/", "/config", "/theme.css", "/favicon.ico", f"{API}/app_id", f"{API}/queue/status")
    with served.owner() as client:
        for _ in range(requests):
            started = time.perf_counter()
            if chosen.random() < 0.5:
                answer, kind = client.get(chosen.choice(honest)), "honest"
                good = answer.status_code == 200
            else:
                kind = chosen.choice(names)
                attack = chosen.choice(kinds[kind])
                try:
                    answer = attack(client)
                    good = answer.status_code >= 400 and SECRET not in answer.text and "root:" not in answer.text
                    good = good and REASONS.get(kind, "") in answer.text
                except httpx.TransportError:  # the door was shut before all was sent
                    good = True
            with lock:
                seconds.append(time.perf_counter() - started)
                counts[kind]["attempts"] += 1
                counts[kind]["failed" if kind == "honest" else "got_through"] += not good


def draw(client: httpx.Client, index: int, values: dict[str, Any], steps: int, seed: int) -> None:
    """Draw one image with the upgraded model, as the button does, and fetch it."""
    session = f"draw{seed}"
    chosen = {
        "prompt": "a red rose",
        "Seed": seed,
        "steps": steps,
        "Guidance": 4.0,
        "ways": ["upgraded"],
        "previews": False,
    }
    assert chosen.keys() <= values.keys(), f"the page has no {chosen.keys() - values.keys()}"
    call = {"data": list({**values, **chosen}.values()), "fn_index": index, "session_hash": session}
    client.post(f"{API}/queue/join", json=call).raise_for_status()
    text = client.get(f"{API}/queue/data", params={"session_hash": session}).text
    assert '"Done."' in text, text[-500:]
    shown = [part.split('"')[0] for part in text.split("/gradio_api/file=")[1:]]
    assert client.get(f"{API}/file={shown[0]}").headers["content-type"] == "image/png"


def load(served: Page, clients: int, requests: int) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Run all clients and a visitor who times the page, and return load and attacks by kind."""
    counts: dict[str, Counter] = {kind: Counter() for kind in ("honest", *attacks(served))}
    seconds: list[float] = []
    lock, over, waits = threading.Lock(), threading.Event(), []

    def visit() -> None:
        with served.owner() as client:
            while not over.wait(1):
                started = time.perf_counter()
                client.get("/config").raise_for_status()
                waits.append(time.perf_counter() - started)

    visitor = threading.Thread(target=visit)
    visitor.start()
    started = time.perf_counter()
    workers = [
        threading.Thread(target=work, args=(served, n, requests, counts, seconds, lock)) for n in range(clients)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - started
    over.set()
    visitor.join()
    honest = counts.pop("honest")
    return {
        "clients": clients,
        "requests_each": requests,
        "seconds": round(taken, 1),
        "honest": {"attempts": honest["attempts"], "failed": honest["failed"]},
        "visitor": {"visits": len(waits), "longest_seconds": round(max(waits, default=0.0), 2)},
    }, {kind: {"attempts": count["attempts"], "got_through": count["got_through"]} for kind, count in counts.items()}


def memory(served: Page, images: int, warm: int, steps: int) -> dict[str, Any]:
    """Resident memory of the page before and after drawing, one reading a quarter."""
    index, values = next((number, found) for number, found in served.handlers() if "prompt" in found)
    with served.owner() as client:
        for number in range(warm):
            draw(client, index, values, steps, number)
        readings = [round(served.resident(), 1)]
        for number in range(images):
            draw(client, index, values, steps, warm + number)
            if (number + 1) % max(1, images // 4) == 0:
                readings.append(round(served.resident(), 1))
    return {"images": images, "before_first_reading": warm, "steps": steps, "rss_mib": readings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--warm", type=int, default=70, help="images before the first reading: sessions fill up to 64"
    )
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, page(Path(folder)) as served:
        measured, kinds = load(served, options.clients, options.requests)
        sizes = f"--clients {options.clients} --requests {options.requests} --images {options.images}"
        command = f"python benchmarks/app_load.py {sizes}"
        found: dict[str, Any] = {"command": command, "attacks": kinds, "load": measured}
        found["memory"] = memory(served, options.images, options.warm, options.steps)
        copies = [
            p
            for p in Path(tempfile.gettempdir()).glob("davae-app-*/**/*")
            if p.is_file() and SECRET.encode() in p.read_bytes()
        ]
        found["victim_copies"] = len(copies)
        found["traceback_lines"] = (Path(folder) / "log").read_text().count("Traceback")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
