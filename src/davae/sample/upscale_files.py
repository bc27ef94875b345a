"""Image files in, enlarged image files and a contact sheet out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms

from davae.backbones.classes import goes_by_class
from davae.data.captions.texts import caption_of_file
from davae.data.decoding import ORIENTATION, fault_of_one, header_size, loaded_image, upright_rgb
from davae.data.findings import Findings
from davae.data.formats import is_image_name
from davae.data.images import grid
from davae.data.latent_cache.key import hash_values
from davae.errors import DataError, ModelError, RunError, UnreadableImage
from davae.files.outputs import SOFTWARE, check_image, is_drawn, save_image
from davae.files.ownership import only_writer
from davae.sample.canvas import DRAFT_LEVEL
from davae.sample.fingerprint import file_hash
from davae.sample.open import SamplingOptions, check_class_prompts
from davae.sample.upscale import (
    LATENT_PASSES,
    PASSES,
    PROJECTION,
    check_enlarging,
    check_size,
    counted,
    is_projected,
    upscale,
)

SHEET = "before-after.png"
CELL, MOST_ROWS = 384, 12  # pixels of the contact sheet's cells, and how many images it shows
LONGEST_PROMPT = 1 << 16  # bytes
UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright, and back
    2: (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_180),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSPOSE),
    6: (Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_90),
    7: (Image.Transpose.TRANSVERSE, Image.Transpose.TRANSVERSE),
    8: (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
}


@dataclass(frozen=True)
class ImageJob:
    """An image file to enlarge.

    Attributes:
        source: the file.
        target: the file to write.
        prompt: description of the image; "" where none is known.
        size: width and height in pixels, upright.
    """

    source: Path
    target: Path
    prompt: str
    size: tuple[int, int]


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image, with the profile and the orientation of its file.

    Attributes:
        image: upright, RGB.
        profile: its ICC profile, where its numbers were left in it; None for sRGB.
        turn: EXIF orientation of the stored pixels, 1 to 8.
    """

    image: Image.Image
    profile: bytes | None
    turn: int


def find_images(places: Sequence[Path], out: Path, prompt: str | None = None) -> list[ImageJob]:
    """Return a job for each image of files and folders, after reading their headers alone.

    Args:
        places: image files, or folders whose images are taken.
        out: folder to write into.
        prompt: one for all; None reads the `.txt` next to each image, where there is one.

    Raises:
        DataError: no image, one that cannot be read, two of one name, or a prompt that is damaged or too long.
        RunError: a file of that name is there, and davae did not write it or this command reads it.
    """
    files: list[Path] = []
    for place in places:
        found = _listed(place, out) if place.is_dir() else [place]
        if not found:
            raise DataError(f"{place}: no image in this folder; give image files or a folder of them")
        files += [file for file in found if file not in files]
    targets, jobs = {out / SHEET: Path(SHEET)}, list[ImageJob]()
    for file in files:
        target = out / f"{file.stem}.png"
        if target in targets:
            raise DataError(f"{file}: {targets[target]} would become {target} as well; use two folders for --out")
        targets[target] = file
        try:
            size = header_size(file)
        except UnreadableImage as error:
            raise DataError(f"{file}: {fault_of_one(error)}") from error
        jobs.append(ImageJob(file, target, _prompt(file) if prompt is None else prompt, size))
    for target in targets:
        if target.is_file() and any(file.samefile(target) for file in files):
            raise RunError(f"{target}: this command reads it; use another --out")
        check_image(target)
    return jobs


def _listed(folder: Path, out: Path) -> list[Path]:
    """Return the images of a folder, without hidden files and without contact sheets of davae."""
    found = sorted(p for p in folder.iterdir() if is_image_name(p.name) and p.name[0] != "." and not p.is_dir())
    results: set[str] = set()
    if out.is_dir() and out.samefile(folder):  # of an earlier run of this command
        results = {SHEET, *(f"{p.stem}.png" for p in found if p.suffix != ".png")}
    return [p for p in found if p.name not in results and not _is_own_sheet(p)]


def _is_own_sheet(path: Path) -> bool:
    if path.name != SHEET:
        return False
    try:
        check_image(path)
    except RunError:
        return False
    return True


def _prompt(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ""
    with text.open("rb") as stream:
        content = stream.read(LONGEST_PROMPT + 1)
    if len(content) > LONGEST_PROMPT:
        raise DataError(f"{text}: more than {LONGEST_PROMPT} bytes; a prompt is a line of text")
    return " ".join(caption_of_file(content, str(text), Findings("files")).split())


def read_source(path: Path) -> DecodedImage:
    """Decode an image upright, converted to sRGB unless its profile is one of RGB.

    Raises:
        DataError: it cannot be read, in one line with its path.
    """
    try:
        with loaded_image(path) as (image, turn):
            profile = image.info.get("icc_profile")
            if image.mode != "RGB" or "transparency" in image.info or not _is_rgb(profile):
                return DecodedImage(upright_rgb(image, "white"), None, turn)
            upright = image.transpose(UPRIGHT[turn][0]) if turn in UPRIGHT else image.copy()
            upright.info = {}  # its pixels are upright, and stay in the numbers of the profile
            return DecodedImage(upright, profile, turn)
    except UnreadableImage as error:
        raise DataError(f"{path}: {fault_of_one(error)}") from error


def _is_rgb(profile: bytes | None) -> bool:
    if not profile:
        return False
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return opened.profile.xcolor_space.strip() == "RGB"
    except (OSError, ImageCms.PyCMSError):  # a damaged one, which `upright_rgb` leaves out as well
        return False


def save_result(image: Image.Image, source: DecodedImage, target: Path, made_from: str = "") -> None:
    """Write an upright result as its source was stored, with its orientation and profile.

    Raises:
        RunError: another file is there, or it cannot be written.
    """
    options: dict[str, Any] = {}
    if source.turn in UPRIGHT:
        image = image.transpose(UPRIGHT[source.turn][1])
        exif = Image.Exif()
        exif[ORIENTATION] = source.turn
        options["exif"] = exif
    if source.profile is not None:
        options["icc_profile"] = source.profile
    save_image(image, target, made_from, **options)


def _is_kept(target: Path, made_from: str) -> bool:
    """Return whether an earlier run of the same command wrote this result."""
    if not is_drawn(target):
        return False
    with Image.open(target, formats=["PNG"]) as image:
        if image.info.get(SOFTWARE) == made_from:
            return True
    raise RunError(
        f"{target}: made from another input, prompt, model or options, or by another davae; use another --out, or move it"
    )


def upscale_files(
    pipeline: Any,
    jobs: Sequence[ImageJob],
    out: Path,
    options: SamplingOptions,
    *,
    weights: str = "",
    strength: float = 0.0,
    times: int = 1,
    window: int | None = None,
    faithful: bool = True,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Enlarge image files in groups that are written at once, and return the contact sheet.

    Results of an earlier run of the same command are kept.

    Args:
        pipeline: an upgraded pipeline.
        jobs, out: the files, and the folder of the results.
        options: steps, guidance, seed and batch size.
        weights: fingerprint of the pipeline's weights.
        strength, times, window, faithful: as `davae.upscale` takes them.
        on_step: called with the steps that are done and their number, over all images.

    Raises:
        ModelError: an image that is too large or lacks its class, a model that cannot enlarge, an argument out of bounds.
        RunError: an earlier result has another input, prompt, weights, options or passes, or another process is writing.
        DataError: an image that cannot be decoded; those before it are written.
    """
    size, unit = {"steps": options.steps, "times": times, "batch_size": options.batch_size}, options.steps * times
    check_enlarging(pipeline, strength=strength, **size)
    _check_jobs(pipeline, jobs, times, window)
    how: dict[str, Any] = {"strength": strength, "window": window, "faithful": faithful}
    projected = is_projected(options.steps, strength, faithful)
    passes = {"faithful": [PROJECTION, PASSES, LATENT_PASSES, DRAFT_LEVEL]} if projected else {}
    about = weights, options.settings, {"times": times, **how, **passes}
    made_from = {job.target: hash_values(*about, file_hash(job.source), job.prompt) for job in jobs}
    with only_writer(out):  # no other command writes between the look at earlier results and the last new one
        kept = {target for target, mark in made_from.items() if _is_kept(target, mark)}
        for start in range(0, len(jobs), options.batch_size):
            group = jobs[start : start + options.batch_size]  # as if never interrupted: the same results to the bit
            shown = counted(on_step, unit * start, unit * len(group), unit * len(jobs))
            if kept.issuperset(job.target for job in group):
                shown(1, 1)
                continue
            sources = [read_source(job.source) for job in group]
            results = upscale(
                pipeline, [source.image for source in sources], [job.prompt for job in group],
                guidance_scale=options.guidance, seed=options.seed, on_step=shown, **size, **how,
            )  # fmt: skip
            for job, source, result in zip(group, sources, results, strict=True):
                if job.target not in kept:
                    save_result(result, source, job.target, made_from[job.target])
        save_image(_sheet(jobs[:MOST_ROWS]), out / SHEET)
    return out / SHEET


def _check_jobs(pipeline: Any, jobs: Sequence[ImageJob], times: int, window: int | None) -> None:
    """Refuse files that are too large, or that lack the class that the model needs."""
    by_class = goes_by_class(pipeline)
    for job in jobs:
        check_size(pipeline, job.size, times, str(job.source), window)
        if by_class and not job.prompt:
            raise ModelError(f"{job.source}: no class; give --prompt, or write it into {job.source.stem}.txt")
    check_class_prompts(pipeline, [job.prompt for job in jobs])


def _sheet(jobs: Sequence[ImageJob]) -> Image.Image:
    """Return the centres of each input, enlarged by Lanczos, and of its result."""
    cell = min(CELL, max(max(header_size(job.target)) for job in jobs))
    cells = []
    for job in jobs:  # one at a time: a result may have a fifth of a GiB
        source, result = (read_source(place).image for place in (job.source, job.target))
        width, height = result.size
        left, top = max(0, (width - cell) // 2), max(0, (height - cell) // 2)
        box = (left, top, min(width, left + cell), min(height, top + cell))
        for image in (source.resize(result.size, Image.Resampling.LANCZOS), result):
            cells.append(Image.new("RGB", (cell, cell), "white"))
            cells[-1].paste(image.crop(box), (0, 0))
    return grid(cells, 2)
