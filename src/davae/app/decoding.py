"""Decoding of an upload in a process of its own, bounded in time and memory."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import resource
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from davae.data.decoding import decode_image, header_size
from davae.errors import UnreadableImage

SECONDS = 20  # for one image, of the clock and of the processor
MEMORY = 2 * 2**30  # bytes that decoding one image may add
WAITING = 4  # images that are decoded at once

MEMORY_LINE = f"too large: decoding it takes more than {MEMORY >> 30} GiB"
_turns = threading.BoundedSemaphore(WAITING)


def decode_apart(content: bytes, max_side: int, max_pixels: int) -> Image.Image:
    """Return the bytes of an image file as upright sRGB, decoded in a child process.

    Args:
        content: the whole file.
        max_side: longest side in pixels that is decoded.
        max_pixels: most pixels in all that are decoded.

    Raises:
        UnreadablePicture: davae's own reasons; `too large` for more pixels than allowed or more than MEMORY;
            `too slow` after SECONDS; `damaged` where the child died.
    """
    Image.init()  # a child that imports a plugin may wait for a lock of a thread that it does not have
    fork = multiprocessing.get_context("fork")
    with _turns:
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=_decode, args=(theirs, content, max_side, max_pixels), daemon=True)
        child.start()
        theirs.close()
        try:
            if not ours.poll(SECONDS):
                raise UnreadableImage("too slow", f"not decoded within {SECONDS} seconds")
            answer = json.loads(ours.recv_bytes(4096))
            if "kind" in answer:
                raise UnreadableImage(answer["kind"], answer["detail"])
            width, height = answer["size"]
            if not ours.poll(SECONDS):
                raise UnreadableImage("too slow", f"not decoded within {SECONDS} seconds")
            pixels = ours.recv_bytes(3 * max_pixels)
            return Image.frombytes("RGB", (width, height), pixels)
        except (EOFError, OSError) as error:
            raise UnreadableImage("damaged", "decoding it ended the decoder") from error
        finally:
            child.kill()
            child.join()
            child.close()
            ours.close()


def _decode(connection: Connection, content: bytes, max_side: int, max_pixels: int) -> None:
    logging.disable()
    _limit_own_process()
    try:
        width, height = header_size(io.BytesIO(content), 2**62)
        if max(width, height) > max_side or width * height > max_pixels:
            raise UnreadableImage("too large", f"{width}x{height}")
        image = decode_image(io.BytesIO(content), "white", max_pixels)
        connection.send_bytes(json.dumps({"size": image.size}).encode())
        connection.send_bytes(image.tobytes())
    except (UnreadableImage, MemoryError) as error:
        kind, _, detail = (str(error) if isinstance(error, UnreadableImage) else MEMORY_LINE).partition(": ")
        connection.send_bytes(json.dumps({"kind": kind, "detail": detail[:300]}).encode())


def _limit_own_process() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        taken = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
