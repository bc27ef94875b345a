"""GenEval: its folder layout, its rules for count, colour and position, and its scores."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from davae.data.decoding import read_image
from davae.errors import ModelError
from davae.evaluate.clip import Clip
from davae.files.atomic import atomic_text, saving
from davae.files.reading import load_json, read_object
from davae.pretrained.placement import own_device
from davae.pretrained.processors import load_processor
from davae.pretrained.stored import load_component

logger = logging.getLogger(__name__)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection's confidence, higher for counting
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# a detector's names -> the official prompts': three of COCO's classes, and the names that older releases give to some
RENAMED = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "sofa": "couch",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "hair dryer": "hair drier",
    "cellphone": "cell phone",
}
UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes without names
MOST = 16  # detections kept of one class
OVERLAP = 0.1  # share of both sizes by which a position must exceed mere touching


@dataclass(frozen=True)
class Found:
    """One detection: class name, confidence, box (left, top, right, bottom) in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str


def relations(a: Found, b: Found) -> set[str]:
    """Return the place of `a` relative to `b`: 'left of', 'right of', 'above', 'below'.

    The set is empty when they overlap too much.

    Args:
        a, b: detections in one image.
    """
    centre_a, centre_b = (torch.tensor([(f.box[0] + f.box[2]) / 2, (f.box[1] + f.box[3]) / 2]) for f in (a, b))
    size_a, size_b = (torch.tensor([f.box[2] - f.box[0], f.box[3] - f.box[1]]) for f in (a, b))
    offset = centre_a - centre_b
    beyond = (offset.abs() - OVERLAP * (size_a + size_b)).clamp(min=0) * offset.sign()
    if bool((beyond.abs() < 1e-3).all()):
        return set()
    dx, dy = (beyond / offset.norm()).tolist()
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def judge(detections: list[Found], request: dict[str, Any], colour_of: Callable[[Found, str], str]) -> Verdict:
    """Return whether an image's detections meet a prompt's request, with the reasons if not.

    Args:
        detections: of the image.
        request: `tag`, `include` (class, count, and where asked color and position), `exclude`.
        colour_of: (detection, class) -> one of COLOURS.
    """
    threshold = COUNTING_THRESHOLD if request["tag"] == "counting" else THRESHOLD
    by_class: dict[str, list[Found]] = {}
    for found in sorted(detections, key=lambda f: -f.score):
        group = by_class.setdefault(found.label, [])
        if found.score > threshold and len(group) < MOST:
            group.append(found)
    reasons: list[str] = []
    groups: list[list[Found] | None] = []
    for part in request.get("include", []):
        label, count = part["class"], part["count"]
        group = by_class.get(label, [])[:count]
        met = len(group) == count
        if not met:
            reasons.append(f"expected {label}>={count}, found {len(group)}")
        elif "color" in part:
            colours = [colour_of(found, label) for found in group]
            met = colours.count(part["color"]) == count
            if not met:
                reasons.append(f"expected {part['color']} {label}>={count}, found {', '.join(colours)}")
        if met and "position" in part:
            relation, target = part["position"]
            others = groups[target]
            if others is None:
                met = False
                reasons.append(f"no target for {label} to be {relation}")
            else:
                met = all(relation in relations(found, other) for found in group for other in others)
                if not met:
                    reasons.append(f"expected {label} {relation} target")
        groups.append(group if met else None)
    for unwanted in request.get("exclude", []):
        label, count = unwanted["class"], unwanted["count"]
        found_count = len(by_class.get(label, []))
        if found_count >= count:
            reasons.append(f"expected {label}<{count}, found {found_count}")
    return Verdict(not reasons, "\n".join(reasons))


def geneval_name(label: str) -> str:
    """Return GenEval's name of a detector's class."""
    plain = " ".join(label.replace("_", " ").lower().split())
    return RENAMED.get(plain, plain)


class Detector:
    """An object detector of transformers with COCO's class names, from a folder or hub id.

    Raises:
        ModelError: there is none, it needs code of its folder, its weights are pickled, damaged or of another model, or
            its classes have no names.
    """

    def __init__(self, model: str):
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        what = f"detector {model}"
        self.model: Any = load_component(model, "", AutoModelForObjectDetection, torch.float32, what)
        self.processor: Any = load_processor(model, AutoImageProcessor, what)
        self.device = own_device()
        self.model.to(self.device)
        labels = [str(label) for label in self.model.config.id2label.values()]
        unnamed = [label for label in labels if UNNAMED.fullmatch(label)]
        if unnamed:
            raise ModelError(
                f"detector {model}: its classes have no names ({unnamed[0]}, ...); use one whose config names COCO's classes"
            )
        self.classes = {geneval_name(label) for label in labels}

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Found]:
        """Return all detections above the rules' lower threshold."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        sizes = torch.tensor([[image.height, image.width]])
        result = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=THRESHOLD, target_sizes=sizes
        )[0]
        names = self.model.config.id2label
        return [
            Found(geneval_name(names[int(label)]), float(score), tuple(float(x) for x in box))  # type: ignore[arg-type]
            for label, score, box in zip(result["labels"], result["scores"], result["boxes"], strict=True)
        ]


def prompt_folder(out: Path, number: int) -> Path:
    """Return the folder of a prompt: `00000/metadata.jsonl` and `00000/samples/00000.png`."""
    return out / f"{number:05d}"


def write_request(out: Path, number: int, request: dict[str, Any]) -> Path:
    """Write the metadata of one prompt, and return the folder for its images.

    Args:
        out: folder of all prompts.
        number: number of the prompt.
        request: its entry in `evaluation_metadata.jsonl`.
    """
    folder = prompt_folder(out, number)
    with saving(folder):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    atomic_text(folder / "metadata.jsonl", json.dumps(request))
    return folder / "samples"


def judge_folder(out: Path, detector: Callable[[Image.Image], list[Found]], clip: Clip) -> list[dict[str, Any]]:
    """Judge every image of a layout, and return a record an image, as the official results.

    Args:
        out: folder of all prompts.
        detector: finds objects in an image.
        clip: classifies colours.

    Raises:
        ModelError: a folder without images.
    """
    records: list[dict[str, Any]] = []
    for folder in sorted(path for path in out.iterdir() if (path / "metadata.jsonl").is_file()):
        request = read_object(folder / "metadata.jsonl")
        if fault := request_fault(request):
            raise ModelError(
                f"{folder / 'metadata.jsonl'}: not one of GenEval's requests: {fault}; remove the folder {folder}"
            )
        for path in sorted((folder / "samples").glob("*.png")):
            image = read_image(path)
            found = detector(image)
            verdict = judge(
                found,
                request,
                lambda one, label, whole=image: clip.colour(whole.crop(_pixels(one, whole)), label, COLOURS),
            )
            records.append(
                {
                    "filename": str(path),
                    "tag": request["tag"],
                    "prompt": request["prompt"],
                    **asdict(verdict),
                    "detections": len(found),
                    "metadata": json.dumps(request),
                }
            )
    if not records:
        raise ModelError(f"{out} holds no images in GenEval's layout")
    return records


def _pixels(found: Found, image: Image.Image) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(x) for x in found.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return left, top, min(max(right, left + 1), image.width), min(max(bottom, top + 1), image.height)


def asked_classes(request: dict[str, Any]) -> set[str]:
    """Return the classes that a prompt's request names."""
    return {part["class"] for key in ("include", "exclude") for part in request.get(key, [])}


def request_fault(request: dict[str, Any]) -> str | None:
    """Return what is wrong with a prompt's entry in GenEval's metadata, None where nothing is."""
    for place, value, right, wanted in _checks(request):
        if not right:
            return f"`{place}` is {'missing or null' if value is None else repr(value)[:80]}; it has to be {wanted}"
    return None


def _checks(request: dict[str, Any]) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield the values of an entry: place, value, whether it is right, and what would be."""
    for key in ("prompt", "tag"):
        yield key, request.get(key), isinstance(request.get(key), str), "a text"
    for key in ("include", "exclude"):
        parts: Any = {"exclude": [], **request}.get(key)
        yield key, parts, isinstance(parts, list), "a list of classes with counts"
        for number, part in enumerate(parts):
            place = f"{key}[{number}]"
            yield place, part, isinstance(part, dict), "an object with `class` and `count`"
            name, count = part.get("class"), part.get("count")
            yield f"{place}.class", name, isinstance(name, str), "a text"
            yield f"{place}.count", count, type(count) is int and count > 0, "a whole number from 1 on"
            if key == "include" and "color" in part:
                yield f"{place}.color", part["color"], part["color"] in COLOURS, f"one of {', '.join(COLOURS)}"
            if key == "include" and "position" in part:
                wanted = f"one of {', '.join(RELATIONS)}, and the number of an earlier class from 0 on"
                yield f"{place}.position", part["position"], _is_position(part["position"], number), wanted


def _is_position(value: Any, earlier: int) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and type(value[1]) is int
    return whole and value[0] in RELATIONS and 0 <= value[1] < earlier


def impossible(requests: list[dict[str, Any]], known: set[str]) -> dict[str, Any]:
    """Compare what prompts ask for with the classes that a detector can find.

    Args:
        requests: the prompts' entries.
        known: classes of the detector.

    Returns:
        `missing_classes`, those that the detector lacks, and `impossible_prompts`, the number of prompts with one of them;
        they are named in the log too.

    Raises:
        ModelError: the detector knows none of the classes.
    """
    asked = {name for request in requests for name in asked_classes(request)}
    missing = sorted(asked - known)
    if asked and not asked & known:
        raise ModelError(f"the detector knows no class of the prompts ({missing[0]}, ...); use one trained on COCO")
    count = sum(bool(asked_classes(request) - known) for request in requests)
    if missing:
        logger.warning(
            "GenEval: the detector lacks %s: %d of %d prompts cannot be met", ", ".join(missing), count, len(requests)
        )
    return {"missing_classes": missing, "impossible_prompts": count}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the records of a results file, an official one or davae's.

    Raises:
        ModelError: no such file, or lines that are no results.
    """
    if not path.is_file():
        raise ModelError(f"GenEval results {path} do not exist")
    try:
        records = [load_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ModelError(f"GenEval results {path}: not one JSON object a line") from error
    if not records or any(not isinstance(r, dict) or "tag" not in r or "correct" not in r for r in records):
        raise ModelError(f"GenEval results {path}: every line needs `tag` and `correct`")
    for number, record in enumerate(records, 1):
        tag, correct = record["tag"], record["correct"]
        if not isinstance(tag, str):
            raise ModelError(
                f"GenEval results {path}: result {number}: `tag` is {tag!r}; it is one of {', '.join(TASKS)}"
            )
        if not (isinstance(correct, bool) or correct in (0, 1)):
            raise ModelError(
                f"GenEval results {path}: result {number}: `correct` is {correct!r}; it is true or false"
            )
    return records


def scores(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of correct images of each task, and `overall`, the mean over tasks."""
    tags = sorted({record["tag"] for record in records})
    tasks = {tag: mean(float(record["correct"]) for record in records if record["tag"] == tag) for tag in tags}
    return {**tasks, "overall": mean(tasks.values())}


def geneval_figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of `davae evaluate geneval-score`: scores, and the images behind each."""
    return {**scores(records), **coverage(records)}


def coverage(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of images of each task, and the official tasks without a result.

    They are under `pictures` and `missing_tasks`.

    A task that is missing is named in the log too, because `overall` is then the mean of the other ones. Where the results
    count detections, `pictures_without_detections` is the number of images in which the detector found nothing; the log
    has a line where that is most of them.
    """
    counts = Counter(record["tag"] for record in records)
    missing = [task for task in TASKS if task not in counts]
    if missing:
        logger.warning(
            "GenEval: no results of %s; `overall` is the mean of the other %d tasks, not the published figure",
            ", ".join(missing),
            len(counts),
        )
    found = [record["detections"] for record in records if isinstance(record.get("detections"), int)]
    empty = {"pictures_without_detections": sum(not number for number in found)} if found else {}
    if found and 2 * empty["pictures_without_detections"] > len(found):
        logger.warning(
            "GenEval: the detector found nothing in %d of %d images, which count as wrong; look at some of them, and at the "
            "detector's classes and confidences (%g is needed)",
            empty["pictures_without_detections"],
            len(found),
            THRESHOLD,
        )
    return {"pictures": dict(sorted(counts.items())), "missing_tasks": missing, **empty}
