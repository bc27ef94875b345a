"""Files of every kind become the right images, captions and classes; what is not used is counted."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageFile, features

import davae
from davae.app.uploads import read_upload
from davae.data.decoding import decode_image, header_size
from davae.data.formats import formats, is_image_name, unused_kind
from davae.data.openmoji import OpenMoji
from davae.data.png_metadata import TAIL
from davae.data.sources import open_source
from davae.errors import DataError, UnreadableImage


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_captions_are_known_without_pixels(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.data.openmoji.main_colour", lambda rgba: "red")
    source = OpenMoji.__new__(OpenMoji)
    source.entries = [type("E", (), {"codepoints": "1", "name": "rose", "colour": ""})()]
    source.pixels, source._colours = np.zeros((1, 4, 4, 4), np.uint8), {}
    draw = lambda: None if seed is None else np.random.default_rng(seed)  # noqa: E731
    assert source.caption(0, draw()) == source.load(0, draw())[1]


def test_findings_name_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "x.png")
    found = open_source(str(tmp_path), 8)
    assert (found.findings.layout, found.findings.class_names) == ("class folders", ("cat", "dog"))
    assert found.caption(1) == "dog"


# -- decoding --------------------------------------------------------------------------------------------------------

CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24], CORNERS[16:, 24:] = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
)
TURN = Image.Transpose
STORED = [None, TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, TURN.TRANSPOSE, TURN.ROTATE_90,
          TURN.TRANSVERSE, TURN.ROTATE_270]  # fmt: skip
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def many_chunks(png: bytes, late: bytes, size: int) -> bytes:
    """A PNG with its pixels in chunks of `size` bytes, chunks between that say IDAT inside, and `late` behind them."""
    start = png.index(b"IDAT") - 4
    pixels = zlib.decompress(png[start + 8 : start + 8 + struct.unpack_from(">I", png, start)[0]])
    packed = zlib.compress(pixels, 0)
    chunks = b"".join(chunk(b"IDAT", packed[at : at + size]) for at in range(0, len(packed), size))
    return png[:start] + chunks + chunk(b"tEXt", b"c\0\0\0\0\x04IDAT") + late + png[-12:]


def oriented(where: str, value: int) -> bytes:
    """CORNERS as a camera stores it under orientation `value`, which is written in the place `where`."""
    turn = STORED[value - 1]
    image = Image.fromarray(CORNERS)
    image = image if turn is None else image.transpose(turn)
    exif, xmp = Image.Exif(), XMP.format(value).encode()
    exif[0x0112] = value
    png, block = saved(image, "PNG"), exif.tobytes()
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    profile = b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    sharp = {"quality": 95, "subsampling": 0}
    makers: dict[str, Callable[[], bytes]] = {
        "JPEG EXIF": lambda: saved(image, "JPEG", exif=exif, **sharp),
        "JPEG XMP": lambda: saved(image, "JPEG", xmp=xmp, **sharp),
        "MPO EXIF": lambda: saved(image, "MPO", save_all=True, append_images=[image], exif=exif, quality=95),
        "PNG EXIF": lambda: saved(image, "PNG", exif=exif),
        "PNG late EXIF": lambda: png[:-12] + chunk(b"eXIf", block.removeprefix(b"Exif\0\0")) + png[-12:],
        "PNG late EXIF, many chunks": lambda: many_chunks(png, chunk(b"eXIf", block.removeprefix(b"Exif\0\0")), 8),
        "PNG long late XMP": lambda: many_chunks(png, chunk(b"tEXt", b"x\0" + b"y" * TAIL) + text, 16),
        "PNG XMP": lambda: png[:33] + text + png[33:],
        "PNG late XMP": lambda: png[:-12] + text + png[-12:],
        "PNG raw profile": lambda: (
            png[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)) + png[33:]
        ),
        "WEBP EXIF": lambda: saved(image, "WEBP", lossless=True, exif=exif),
        "WEBP XMP": lambda: saved(image, "WEBP", lossless=True, xmp=xmp),
        "AVIF EXIF": lambda: saved(image, "AVIF", quality=95, exif=exif),
        "AVIF XMP": lambda: saved(image, "AVIF", quality=95, xmp=xmp),
        "TIFF": lambda: saved(image, "TIFF", tiffinfo={274: value}),
        "TIFF LZW": lambda: saved(image, "TIFF", compression="tiff_lzw", tiffinfo={274: value}),
        "TIFF XMP": lambda: saved(image, "TIFF", tiffinfo={700: xmp}),
    }
    return makers[where]()


@pytest.mark.parametrize(
    "where",
    ["JPEG EXIF", "JPEG XMP", "MPO EXIF", "PNG EXIF", "PNG late EXIF", "PNG XMP",
     "PNG late EXIF, many chunks", "PNG long late XMP", "PNG late XMP", "PNG raw profile",
     "WEBP EXIF", "WEBP XMP", "AVIF EXIF", "AVIF XMP", "TIFF", "TIFF LZW", "TIFF XMP"],
)  # fmt: skip
def test_every_orientation_is_turned_once_and_measured_turned(where: str) -> None:
    if where.startswith("AVIF") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    spots = np.ix_([8, 24], [8, 40])
    for value in range(1, 9):
        data = oriented(where, value)
        image = decode_image(io.BytesIO(data))
        assert header_size(io.BytesIO(data)) == image.size == (48, 32), value
        assert np.abs(np.asarray(image, int)[spots] - CORNERS[spots].astype(int)).max() < 40, value


def raw_png(width: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of one row as the specification writes it: Pillow cannot save most of these."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def hidden(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def raw_tiff(bits: int, layout: int, data: bytes, width: int, photometric: int = 1) -> bytes:
    """A TIFF of one row and one channel; `layout` is 1 unsigned, 2 signed, 3 float."""
    tags = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 0,
        277: 1,
        278: 1,
        279: len(data),
        339: layout,
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
GREEN = (0, 255, 0)
DEPTHS: dict[str, tuple[bytes, list[tuple[int, int, int]]]] = {
    "16-bit grey, dark": (raw_png(2, 16, 0, struct.pack(">2H", 250, 260)), [(1, 1, 1)] * 2),
    "16-bit grey": (raw_png(3, 16, 0, struct.pack(">3H", 0, 257 * 100, 65535)), [(0, 0, 0), (100,) * 3, (255,) * 3]),
    "16-bit grey, one value transparent": (
        raw_png(2, 16, 0, struct.pack(">2H", 250, 65535), hidden(250)), [GREEN, (255,) * 3]),
    "1-bit": (raw_png(2, 1, 0, b"\x40"), [(0, 0, 0), (255, 255, 255)]),
    "1-bit, transparent": (raw_png(2, 1, 0, b"\x40", hidden(1)), [(0, 0, 0), GREEN]),
    "2-bit, transparent": (raw_png(2, 2, 0, b"\x60", hidden(2)), [(85,) * 3, GREEN]),
    "4-bit, transparent": (raw_png(2, 4, 0, b"\xf3", hidden(15)), [GREEN, (51,) * 3]),
    "8-bit, transparent": (raw_png(2, 8, 0, bytes([200, 9]), hidden(200)), [GREEN, (9,) * 3]),
    "RGB, transparent": (raw_png(2, 8, 2, bytes([1, 2, 3, 200, 0, 0]), hidden(1, 2, 3)), [GREEN, (200, 0, 0)]),
    "16-bit RGB": (raw_png(1, 16, 2, struct.pack(">3H", 257 * 9, 65535, 0)), [(9, 255, 0)]),
    "16-bit RGB, transparent": (
        raw_png(2, 16, 2, struct.pack(">6H", 0xFF00, 0, 0, 0, 0, 0), hidden(0xFF00, 0, 0)), [GREEN, (0, 0, 0)]),
    "16-bit grey with alpha": (raw_png(2, 16, 4, struct.pack(">4H", 65535, 0, 0, 65535)), [GREEN, (0, 0, 0)]),
    "16-bit RGBA": (raw_png(1, 16, 6, struct.pack(">4H", 65535, 0, 0, 0)), [GREEN]),
    "palette, transparent": (
        raw_png(2, 8, 3, bytes([0, 1]), PALETTE, chunk(b"tRNS", bytes([0, 255]))), [GREEN, (0, 0, 255)]),
    "palette of 1 bit, transparent": (
        raw_png(2, 1, 3, b"\x40", PALETTE, chunk(b"tRNS", bytes([0]))), [GREEN, (0, 0, 255)]),
    "LA": (saved(Image.new("LA", (1, 1), (80, 255)), "PNG"), [(80, 80, 80)]),
    "16-bit TIFF": (raw_tiff(16, 1, struct.pack("<2H", 257 * 3, 65535), 2), [(3,) * 3, (255,) * 3]),
    "16-bit TIFF, 0 is white": (raw_tiff(16, 1, struct.pack("<2H", 0, 65535), 2, 0), [(255,) * 3, (0, 0, 0)]),
    "12-bit TIFF": (raw_tiff(12, 1, bytes([0xFF, 0xF0, 0x00]), 2), [(255,) * 3, (0, 0, 0)]),
    "16-bit PGM": (b"P5 2 1 65535\n" + struct.pack(">2H", 250, 65535), [(1, 1, 1), (255,) * 3]),
    "10-bit PGM": (b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023), [(0, 0, 0), (255,) * 3]),
    "CMYK TIFF": (saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)]),
    "LAB TIFF": (saved(Image.new("LAB", (1, 1), (0, 128, 128)), "TIFF"), [(0, 0, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEPTHS)
def test_depths_and_transparent_values(kind: str) -> None:
    data, expected = DEPTHS[kind]
    image = decode_image(io.BytesIO(data), "lime")
    assert header_size(io.BytesIO(data)) == image.size
    off = np.abs(np.asarray(image, int)[0] - np.asarray(expected))
    assert off.max() <= ("LAB" in kind), image.getpixel((0, 0))  # the colour engine rounds


def floats(*values: float) -> bytes:
    return raw_tiff(32, 3, struct.pack(f"<{len(values)}f", *values), len(values))


def test_floats_are_refused_by_name_or_read_where_the_option_says_how() -> None:
    with pytest.raises(UnreadableImage, match=r"float pixels: set data\.float_pixels=unit"):
        header_size(io.BytesIO(floats(0.0, 1.0)))
    image = decode_image(io.BytesIO(floats(0.0, 0.5, 1.0)), floats="unit")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]
    for values in ((0.0, 230.0), (-0.5, 0.5), (math.nan, 0.5), (math.inf, 0.0)):
        with pytest.raises(UnreadableImage, match="where 0 to 1 was expected"):
            decode_image(io.BytesIO(floats(*values)), floats="unit")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (raw_tiff(32, 1, struct.pack("<2I", 1, 2), 2), "32-bit pixels"),
        (raw_tiff(32, 2, struct.pack("<2i", 1, 2), 2), "32-bit pixels"),
        (raw_tiff(64, 3, struct.pack("<2d", 1, 2), 2), "unknown pixel layout: a TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"not an image that davae reads: .*\(EPS\)"),
        (b"8BPS\0\1" + b"\0" * 40, r"not an image that davae reads: .*\(PSD\)"),
        (b"#define x_width 3\n#define x_height 3\n", r"\(XBM\)"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC; `pip install pillow-heif` reads it"),
        (b"\xff\x0a" + b"\0" * 20, "JPEG XL; `pip install pillow-jxl-plugin` reads it"),
        (b"II", "not an image"),
        (b"%!", "not an image"),
    ],
)
def test_what_davae_does_not_read_is_named(data: bytes, message: str) -> None:
    for read in (decode_image, header_size):
        with pytest.raises(UnreadableImage, match=message):
            read(io.BytesIO(data))


def test_no_program_runs_for_postscript_named_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    started: list[int] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(1))
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "__init__", lambda *a, **k: started.append(1))
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "cat.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n")
    source = open_source(str(tmp_path), 8)
    with pytest.raises(UnreadableImage, match="not an image that davae reads"):
        source.load(0)
    with pytest.raises(DataError, match="not an image that davae reads"):
        read_upload(tmp_path / "cat.png")
    assert started == []


def test_images_are_opened_in_one_place() -> None:
    """And a PNG of davae's own is looked for in a PNG alone, on a floor below the data."""
    root = Path(davae.__file__).parent
    found = {
        (path.relative_to(root).as_posix(), line.strip())
        for path in root.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if "Image.open(" in line and 'formats=["PNG"]' not in line
    }
    assert found == {("data/formats.py", "return Image.open(stream, formats=formats())")}


def test_a_plugin_adds_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(ImageFile.ImageFile):
        format = "FOREIGN"

        def _open(self) -> None:
            self._size, self._mode = (5, 4), "L"

    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION})
    before = formats()
    Image.register_open("FOREIGN", Foreign, lambda prefix: prefix.startswith(b"foreign"))
    Image.register_extension("FOREIGN", ".foreign")
    assert set(formats()) - set(before) == {"FOREIGN"}
    assert is_image_name("A.FOREIGN")
    assert header_size(io.BytesIO(b"foreign image")) == (5, 4)


def test_endings_come_from_pillows_registry() -> None:
    for name in ("a.jfif", "a.jpe", "a.JP2", "a.ppm", "a.pgm", "a.apng", "a.mpo", "a.dib", "a.tif"):
        assert is_image_name(name), name
    for name in ("a.eps", "a.ps", "a.psd", "a.txt", "a.ico", "a", ".png"):
        assert not is_image_name(name), name
    assert unused_kind("a.heic") == ".heic (needs pillow-heif)"
    assert unused_kind("a.PSD") == ".psd (not an image that davae reads)"
    assert unused_kind("a.mp4") == ".mp4"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_animations_are_found_by_content_and_counting_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [picture(i, 9, 9) for i in range(5)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableImage, match="animation: 5 frames"):
        header_size(io.BytesIO(data))
    monkeypatch.setattr("davae.data.decoding.MAX_FRAMES", 3)
    monkeypatch.setattr("davae.data.decoding.MAX_COUNTED", 3)
    with pytest.raises(UnreadableImage, match=f"animation: {2 if kind == 'GIF' else 3} or more frames"):
        decode_image(io.BytesIO(data))
    one = saved(frames[0], kind, save_all=True)
    assert decode_image(io.BytesIO(one)).size == header_size(io.BytesIO(one)) == (9, 9)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        decode_image(tmp_path / "a.png")


def test_damaged_avif_is_left_out_by_name() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = saved(Image.fromarray(CORNERS), "AVIF", quality=95)
    body, items = data.rindex(b"mdat") + 4, data.index(b"iloc")
    for broken in (data[:body] + b"\xff" * (len(data) - body), data[:items] + b"free" + data[items + 4 :]):
        with pytest.raises(UnreadableImage, match=r"damaged|not an image"):
            decode_image(io.BytesIO(broken))
