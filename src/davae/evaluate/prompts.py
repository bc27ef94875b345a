"""Prompt following: images of benchmark prompts, CLIP score, GenEval."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from davae.data.decoding import read_image
from davae.data.latent_cache.key import hash_values
from davae.data.prompts import Prompt, read_prompts
from davae.errors import DataError, ModelError
from davae.evaluate.clip import Clip
from davae.evaluate.geneval import Detector, coverage, impossible, judge_folder, request_fault, scores, write_request
from davae.files.atomic import atomic_file, atomic_text
from davae.files.outputs import is_drawn
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, model_places, open_text_model
from davae.sample.resume import kept_images, stretches

OnBatch = Callable[[int, int], None]
PART = 32  # images between two writes to disk


def draw_missing(pipeline: str, images: list[tuple[str, Path]], options: SamplingOptions, on_batch: OnBatch) -> None:
    """Draw the images whose file does not exist yet.

    Image i depends on the settings and i alone.

    Args:
        pipeline: the model, by the names that `open_model` takes.
        images: prompt and file of each image.
        options: how the images are drawn.
        on_batch: called with the images that are done and their number.
    """
    missing = [number for number, (_, path) in enumerate(images) if not is_drawn(path)]
    if not missing:
        return
    model = open_text_model(pipeline, options.placement)
    done = len(images) - len(missing)
    for start, stop in stretches(missing, PART):
        drawn = generate(model, [prompt for prompt, _ in images[start:stop]], options, first=start)
        for (_, path), image in zip(images[start:stop], drawn, strict=True):
            with atomic_file(path) as partial:
                image.save(partial, format="PNG")
        done += stop - start
        on_batch(done, len(images))


@contextmanager
def kept_drawings(out: Path, pipeline: str, prompts: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold a folder of images for this process, and yield their settings with the weights' hash.

    Args:
        out: folder of the images.
        pipeline: the model, by the names that `open_model` takes.
        prompts: file of the prompts.
        settings: values that the images depend on, besides the weights.

    Raises:
        ModelError: images of other settings, prompts or weights.
        RunError: the folder holds something else, or another process draws into it.
    """
    weights = {"weights": model_fingerprint(model_places(pipeline))}
    about = {"pipeline": pipeline, "prompt_file": str(prompts)}
    with kept_images(out, {**settings, **weights}, about, former={**settings, "pipeline": pipeline}):
        yield {"pipeline": pipeline, **settings, **weights}


def digest(requests: list[Prompt]) -> str:
    """Return a hash of prompts in their order, which numbers the images."""
    return hash_values([[prompt.name, prompt.text, prompt.record] for prompt in requests])


def evaluate_prompts(
    pipeline: str,
    prompts: Path,
    out: Path,
    options: SamplingOptions,
    *,
    num: int | None,
    clip: str | None,
    on_batch: OnBatch,
) -> dict[str, Any]:
    """Draw an image a prompt into files named after the prompts, and measure their CLIP score.

    Args:
        pipeline: the model, by the names that `open_model` takes.
        prompts: file of prompts.
        out: folder of the images; those of an earlier call are kept.
        options: how the images are drawn.
        num: number of prompts, from the first on; None takes all.
        clip: folder or hub id of a CLIP model; None leaves the score out.
        on_batch: called with the images that are done and their number.

    Returns:
        The figures of `davae evaluate prompts`.

    Raises:
        DataError: two prompts of one name.
        ModelError: images of other settings in `out`, or a CLIP model that cannot be loaded.
    """
    requests = read_prompts(prompts)
    chosen = requests[:num]
    scorer = None if clip is None else Clip(clip)  # a wrong folder is an error before anything is drawn
    images = [(prompt.text, out / f"{file_name(prompt)}.png") for prompt in chosen]
    if len({path for _, path in images}) < len(images):
        raise DataError(f"prompt file {prompts}: two prompts have the same name")
    with kept_drawings(out, pipeline, prompts, {"prompts": digest(requests), **options.settings}) as settings:
        draw_missing(pipeline, images, options, on_batch)
    figures: dict[str, Any] = {**settings, "prompts": str(prompts), "pictures": len(images), "folder": str(out)}
    if scorer is not None:
        parts = []
        for start in range(0, len(images), PART):
            part = images[start : start + PART]
            drawn = [read_image(path) for _, path in part]
            parts.append(scorer.score(drawn, [text for text, _ in part]))
        values = torch.cat(parts)
        figures |= {
            "clip": clip,
            "clip_score": float(values.mean()),
            "clip_score_std": float(values.std(correction=0)),
        }
    return figures


def file_name(prompt: Prompt) -> str:
    """Return a prompt's own name without its suffix, with numbers in five digits."""
    stem = re.sub(r"[\x00-\x1f]", "_", Path(prompt.name).stem)[:120] or "prompt"
    return f"{int(stem):05d}" if stem.isdigit() else stem


def evaluate_geneval(
    pipeline: str,
    prompts: Path,
    out: Path,
    options: SamplingOptions,
    *,
    num: int,
    detector: str | None,
    clip: str | None,
    on_batch: OnBatch,
) -> dict[str, Any]:
    """Draw images of GenEval's prompts, and judge them where a detector and CLIP are given.

    Args:
        pipeline: the model, by the names that `open_model` takes.
        prompts: GenEval's `evaluation_metadata.jsonl`.
        out: folder of the images; those of an earlier call are kept.
        options: how the images are drawn.
        num: images a prompt.
        detector, clip: folders or hub ids of an object detector and of a CLIP model, both or neither.
        on_batch: called with the images that are done and their number.

    Returns:
        The figures of `davae evaluate geneval`.

    Raises:
        DataError: prompts that are not GenEval's.
        ModelError: a detector without CLIP, images of other settings in `out`, or models that cannot be loaded.
    """
    if (detector is None) != (clip is None):
        raise ModelError("judging images needs both a detector and a CLIP model (for colours)")
    requests = read_prompts(prompts)
    for request in requests:
        if fault := request_fault(request.record):
            place = f"line {int(request.name) + 1}" if prompts.suffix.lower() == ".jsonl" else f"entry {request.name}"
            raise DataError(f"{prompts} is not GenEval's metadata: {place}: {fault}")
    judge = None if detector is None or clip is None else (Detector(detector), Clip(clip))
    lacking = {} if judge is None else impossible([r.record for r in requests], judge[0].classes)
    with kept_drawings(
        out, pipeline, prompts, {"prompts": digest(requests), "num": num, **options.settings}
    ) as settings:
        images = []
        for number, request in enumerate(requests):
            folder = write_request(out, number, request.record)
            images += [(request.text, folder / f"{sample:05d}.png") for sample in range(num)]
        draw_missing(pipeline, images, options, on_batch)
        figures: dict[str, Any] = {**settings, "prompts": str(prompts), "pictures": len(images), "folder": str(out)}
        if judge is not None:
            records = judge_folder(out, *judge)
            atomic_text(out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            figures |= {"detector": detector, "clip": clip, "geneval_with_this_detector": scores(records)}
            figures |= {f"geneval_{name}": value for name, value in {**coverage(records), **lacking}.items()}
    return figures
