"""Prompt following: pictures for benchmark prompts, CLIP score, GenEval."""

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
from davae.evaluate.geneval import Detector, coverage, impossible, is_request, judge_folder, scores, write_request
from davae.files.atomic import atomic_file, atomic_text
from davae.files.outputs import is_drawn
from davae.pretrained.placement import FULL, Placement
from davae.sample.fingerprint import model_fingerprint
from davae.sample.generate import generate
from davae.sample.open import model_places, open_text_model
from davae.sample.resume import Drawing, kept_images, stretches

Watch = Callable[[int, int], None]
PART = 32  # pictures between two writes to disk


def draw_missing(pipeline: str, wanted: list[tuple[str, Path]], how: Drawing, on_batch: Watch) -> None:
    """Draw (prompt, file) pairs whose file is not there yet. Picture i depends on the settings and i alone."""
    missing = [number for number, (_, path) in enumerate(wanted) if not is_drawn(path)]
    if not missing:
        return
    model = open_text_model(pipeline, how.placement)
    done = len(wanted) - len(missing)
    for start, stop in stretches(missing, PART):
        texts = [prompt for prompt, _ in wanted[start:stop]]
        pictures = generate(
            model,
            texts,
            resolution=how.resolution,
            steps=how.steps,
            guidance_scale=how.guidance,
            seed=how.seed,
            first=start,
            batch_size=how.batch_size,
        )
        for (_, path), picture in zip(wanted[start:stop], pictures, strict=True):
            with atomic_file(path) as partial:
                picture.save(partial, format="PNG")
        done += stop - start
        on_batch(done, len(wanted))


@contextmanager
def kept_drawings(out: Path, pipeline: str, prompts: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold a folder of pictures for this process, and yield what they depend on, the model's weights included.

    Args:
        settings: the other things that they depend on.

    Raises:
        ModelError: the pictures there are of other settings, prompts or weights.
        RunError: the folder holds something else, or another process draws into it.
    """
    weights = {"weights": model_fingerprint(model_places(pipeline))}
    about = {"pipeline": pipeline, "prompt_file": str(prompts)}
    with kept_images(out, {**settings, **weights}, about, former={**settings, "pipeline": pipeline}):
        yield {"pipeline": pipeline, **settings, **weights}


def digest(requests: list[Prompt]) -> str:
    """Hash of prompts and their order: a picture's number stands for one of them."""
    return hash_values([[prompt.name, prompt.text, prompt.record] for prompt in requests])


def evaluate_prompts(
    pipeline: str,
    prompts: Path,
    out: Path,
    *,
    num: int | None,
    steps: int,
    guidance: float,
    seed: int,
    clip: str | None,
    on_batch: Watch,
    resolution: int | None = None,
    batch_size: int = 16,
    placement: Placement = FULL,
) -> dict[str, Any]:
    """Figures of `davae evaluate prompts`: a picture a prompt in `out`, by the prompt's name, and their CLIP score.

    `resolution` is in pixels; None is the pipeline's own size.
    """
    requests = read_prompts(prompts)
    chosen = requests[:num]
    scorer = None if clip is None else Clip(clip)  # a wrong folder is told before drawing
    how = Drawing(steps, guidance, seed, resolution, batch_size, placement)
    wanted = [(prompt.text, out / f"{file_name(prompt)}.png") for prompt in chosen]
    if len({path for _, path in wanted}) < len(wanted):
        raise DataError(f"prompt file {prompts}: two prompts have the same name")
    with kept_drawings(out, pipeline, prompts, {"prompts": digest(requests), **how.settings}) as settings:
        draw_missing(pipeline, wanted, how, on_batch)
    figures: dict[str, Any] = {**settings, "prompts": str(prompts), "pictures": len(wanted), "folder": str(out)}
    if scorer is not None:
        parts = []
        for start in range(0, len(wanted), PART):
            part = wanted[start : start + PART]
            images = [read_image(path) for _, path in part]
            parts.append(scorer.score(images, [text for text, _ in part]))
        values = torch.cat(parts)
        figures |= {
            "clip": clip,
            "clip_score": float(values.mean()),
            "clip_score_std": float(values.std(correction=0)),
        }
    return figures


def file_name(prompt: Prompt) -> str:
    """A prompt's own name without its suffix, numbers in five digits; MJHQ sorts into categories."""
    stem = re.sub(r"[\x00-\x1f]", "_", Path(prompt.name).stem)[:120] or "prompt"
    return f"{int(stem):05d}" if stem.isdigit() else stem


def evaluate_geneval(
    pipeline: str,
    prompts: Path,
    out: Path,
    *,
    num: int,
    steps: int,
    guidance: float,
    seed: int,
    detector: str | None,
    clip: str | None,
    on_batch: Watch,
    resolution: int | None = None,
    batch_size: int = 16,
    placement: Placement = FULL,
) -> dict[str, Any]:
    """Figures of `davae evaluate geneval`: the official layout in `out`, judged where a detector and CLIP are given.

    `resolution` is in pixels; None is the pipeline's own size.
    """
    if (detector is None) != (clip is None):
        raise ModelError("judging pictures needs both a detector and a CLIP model (for colours)")
    requests = read_prompts(prompts)
    wrong = next((r for r in requests if not is_request(r.record)), None)
    if wrong is not None:
        raise DataError(
            f"{prompts} is not GenEval's metadata: the prompt '{wrong.text}' has no `tag` and `include` of classes and counts"
        )
    judge = None if detector is None or clip is None else (Detector(detector), Clip(clip))
    lacking = {} if judge is None else impossible([r.record for r in requests], judge[0].classes)
    how = Drawing(steps, guidance, seed, resolution, batch_size, placement)
    with kept_drawings(out, pipeline, prompts, {"prompts": digest(requests), "num": num, **how.settings}) as settings:
        wanted = []
        for number, request in enumerate(requests):
            folder = write_request(out, number, request.record)
            wanted += [(request.text, folder / f"{sample:05d}.png") for sample in range(num)]
        draw_missing(pipeline, wanted, how, on_batch)
        figures: dict[str, Any] = {**settings, "prompts": str(prompts), "pictures": len(wanted), "folder": str(out)}
        if judge is not None:
            records = judge_folder(out, *judge)
            atomic_text(out / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            figures |= {"detector": detector, "clip": clip, "geneval_with_this_detector": scores(records)}
            figures |= {f"geneval_{name}": value for name, value in {**coverage(records), **lacking}.items()}
    return figures
