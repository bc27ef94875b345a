"""Prompt files, CLIP score, and GenEval's rules on boxes drawn by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import load_file, save_file

from davae.data.prompts import read_prompts
from davae.errors import DataError, ModelError
from davae.evaluate.clip import Clip
from davae.evaluate.geneval import (
    TASKS,
    Detector,
    Found,
    coverage,
    geneval_name,
    impossible,
    judge,
    judge_folder,
    read_results,
    relations,
    request_fault,
    scores,
    write_request,
)
from davae.evaluate.prompts import evaluate_geneval, evaluate_prompts
from davae.sample.open import SamplingOptions
from davae.sample.resume import stretches


def test_prompt_files_of_the_benchmarks(shared: Path, tmp_path: Path):
    parti = read_prompts(shared / "prompts/PartiPrompts.tsv")
    assert len(parti) == 1632
    assert parti[0].record["Category"] == "Abstract"
    geneval = read_prompts(shared / "prompts/geneval_evaluation_metadata.jsonl")
    assert len(geneval) == 553
    assert geneval[0].text == "a photo of a bench"

    mjhq = tmp_path / "meta_data.json"
    mjhq.write_text(json.dumps({"abc": {"category": "animals", "prompt": "a cat"}, "def": {"prompt": "a dog"}}))
    assert [(p.name, p.text) for p in read_prompts(mjhq)] == [("abc", "a cat"), ("def", "a dog")]
    texts = tmp_path / "texts.json"
    texts.write_text('["a cup", "a hat"]')
    assert [(p.text, p.record) for p in read_prompts(texts)] == [("a cup", {}), ("a hat", {})]
    part = tmp_path / "part-000001.json"  # DiffusionDB
    part.write_text(json.dumps({"x.png": {"p": "a tree", "se": 1, "st": 50}}))
    assert read_prompts(part)[0].text == "a tree"
    pyarrow = pytest.importorskip("pyarrow")
    parquet = tmp_path / "metadata.parquet"
    table = pyarrow.table({"image_name": ["y.png"], "prompt": ["a lake"], "seed": [3]})
    pytest.importorskip("pyarrow.parquet").write_table(table, parquet)
    assert [(p.name, p.text) for p in read_prompts(parquet)] == [("y.png", "a lake")]


def test_a_detector_of_coco_knows_all_classes_of_geneval(shared: Path):
    detection = pytest.importorskip("torchvision.models.detection")
    known = {geneval_name(label) for label in detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]}
    requests = [p.record for p in read_prompts(shared / "prompts/geneval_evaluation_metadata.jsonl")]
    asked = {part["class"] for r in requests for part in r["include"] + r.get("exclude", [])}
    assert asked <= known


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "holds no prompts"),
        ("a.tsv", "Words\tKind\nx\ty\n", "no column prompt"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.json", "[3]", "found '3' where a text or an object belongs"),
        ("a.doc", "x", "unknown format"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def box(label: str, x: float, y: float, score: float = 0.95, side: float = 10) -> Found:
    return Found(label, score, (x, y, x + side, y + side))


def test_relations_need_a_clear_distance():
    assert relations(box("a", 50, 0), box("b", 0, 0)) == {"right of"}
    assert relations(box("a", 0, 0), box("b", 50, 0)) == {"left of"}
    assert relations(box("a", 0, 0), box("b", 0, 50)) == {"above"}
    assert relations(box("a", 0, 50), box("b", 0, 0)) == {"below"}
    assert relations(box("a", 1.5, 0), box("b", 0, 0)) == set()  # within a tenth of both sizes
    assert relations(box("a", 50, 50), box("b", 0, 0)) == {"right of", "below"}


def colour_by_place(found: Found, label: str) -> str:
    return "red" if found.box[0] < 20 else "blue"


@pytest.mark.parametrize(
    ("tag", "include", "exclude", "found", "correct"),
    [
        ("single_object", [{"class": "dog", "count": 1}], [], [box("dog", 0, 0, 0.31)], True),
        ("single_object", [{"class": "dog", "count": 1}], [], [box("dog", 0, 0, 0.29)], False),
        ("two_object", [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], [], [box("dog", 0, 0)], False),
        # counting asks for more confidence, and for no more than the number
        ("counting", [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], [box("dog", 0, 0)] * 2, True),
        ("counting", [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], [box("dog", 0, 0)] * 3, False),
        ("counting", [{"class": "dog", "count": 2}], [], [box("dog", 0, 0, 0.8)] * 2, False),
        ("colors", [{"class": "dog", "count": 1, "color": "red"}], [], [box("dog", 0, 0)], True),
        ("colors", [{"class": "dog", "count": 1, "color": "red"}], [], [box("dog", 30, 0)], False),
        (
            "position",
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
            [],
            [box("cat", 0, 0), box("dog", 60, 0)],
            True,
        ),
        (
            "position",
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            [box("cat", 0, 0), box("dog", 60, 0)],
            False,
        ),
        (
            "position",
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
            [],
            [box("dog", 60, 0)],
            False,
        ),
    ],
)
def test_geneval_rules(tag: str, include: list, exclude: list, found: list, correct: bool):
    verdict = judge(found, {"tag": tag, "include": include, "exclude": exclude}, colour_by_place)
    assert verdict.correct is correct
    assert bool(verdict.reason) is not correct


def test_scores_of_an_official_results_file(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    lines = [("colors", True), ("colors", False), ("counting", True)]
    path.write_text("\n".join(json.dumps({"tag": tag, "correct": right}) for tag, right in lines))
    assert scores(read_results(path)) == {"colors": 0.5, "counting": 1.0, "overall": 0.75}
    path.write_text(json.dumps({"tag": "colors"}))
    with pytest.raises(ModelError, match="needs `tag` and `correct`"):
        read_results(path)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from davae.tasks.text_to_image import build_tokenizer

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**size, "image_size": 16, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = build_tokenizer(["a photo of a red dog", "a blue colored object"], 600, 16)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=5,
        id2label={0: "bench", 1: "cow"},
        label2id={"bench": 0, "cow": 1},
    )
    folder = tmp_path_factory.mktemp("detector")
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_a_hundred_cosines(tiny_clip: Path):
    clip = Clip(str(tiny_clip))
    images, texts = [picture(0), picture(1)], ["a red dog", "a blue object"]
    inputs = clip.processor(text=texts, images=images, return_tensors="pt", padding=True)
    logits = clip.model(**inputs).logits_per_image / clip.model.logit_scale.exp()
    assert torch.allclose(clip.score(images, texts), 100 * logits.diagonal().clamp(min=0), atol=1e-4)
    assert clip.colour(picture(0), "dog", ("red", "blue")) in {"red", "blue"}


def test_a_detector_of_transformers(tiny_detector: Path):
    found = Detector(str(tiny_detector))(picture(3, 40, 30))
    assert found, "a random head of three classes is above 0.3 somewhere"
    assert {f.label for f in found} <= {"bench", "cow"}
    with pytest.raises(ModelError, match="detector /nowhere"):
        Detector("/nowhere")


class Planted:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["clip", "detector"])
def test_models_of_judges_are_checked_like_any_other(
    kind: str, tiny_clip: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, load = {"clip": (tiny_clip, Clip), "detector": (tiny_detector, Detector)}[kind]
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    number = count()

    def refused(message: str, change: Callable[[Path], object]) -> None:
        folder = shutil.copytree(source, tmp_path / str(next(number)))
        change(folder)
        with pytest.raises(ModelError, match=message):
            load(str(folder))

    def configure(folder: Path, name: str, **values: Any) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))

    def weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(Planted(tmp_path / "ran"), folder / "pytorch_model.bin")

    def own_code(folder: Path, name: str, **auto_map: str) -> None:
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        configure(folder, name, **({"model_type": "own"} if name == "config.json" else {}), auto_map=auto_map)

    refused("is a pickle", pickled)
    refused("the weights lack", lambda f: weights(f, lambda t: dict(list(t.items())[1:])))
    refused("which the config does not ask for", lambda f: weights(f, lambda t: {**t, "x": torch.ones(1)}))
    refused(
        "NaN or infinite", lambda f: weights(f, lambda t: {k: torch.full_like(v, torch.nan) for k, v in t.items()})
    )
    size = {"shortest_edge": 10**9, "longest_edge": 10**9}
    name = next(n for n in ("preprocessor_config.json", "processor_config.json") if (source / n).is_file())
    refused("edge is 1000000000", lambda f: configure(f, name, size=size, image_processor={"size": size}))
    if kind == "detector":
        model = {"AutoConfig": "code.Own", "AutoModelForObjectDetection": "code.Own"}
        refused("cannot be loaded", lambda f: own_code(f, "config.json", **model))
        folder = shutil.copytree(source, tmp_path / "own")
        own_code(folder, name, AutoImageProcessor="code.Own")
        Detector(str(folder))  # the processor that its model's config names, not the code
    assert not (tmp_path / "ran").exists()
    assert not asked


def test_pictures_for_prompts_resume_and_are_scored(tiny_base: Path, tiny_clip: Path, tmp_path: Path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red square\na blue disc\na red disc\n")
    how = SamplingOptions(steps=1, guidance=1.0, seed=0)
    options = {"options": how, "num": None, "on_batch": lambda done, total: None}
    figures = evaluate_prompts(str(tiny_base), prompts, tmp_path / "out", clip=str(tiny_clip), **options)
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [f.name for f in files] == ["00000.png", "00001.png", "00002.png"]
    assert 0 <= figures["clip_score"] <= 100
    before = files[1].read_bytes()
    files[1].unlink()
    again = evaluate_prompts(str(tiny_base), prompts, tmp_path / "out", clip=str(tiny_clip), **options)
    assert files[1].read_bytes() == before
    assert again == figures
    with pytest.raises(ModelError, match="other settings"):
        evaluate_prompts(
            str(tiny_base), prompts, tmp_path / "out", clip=None, **{**options, "options": replace(how, steps=2)}
        )
    large = replace(how, resolution=32)
    with pytest.raises(ModelError, match="other settings"):
        evaluate_prompts(str(tiny_base), prompts, tmp_path / "out", clip=None, **{**options, "options": large})
    prompts.write_text("a red square\na blue disc\na green disc\n")
    with pytest.raises(ModelError, match="other settings"):  # the file's name is the same, its prompts are not
        evaluate_prompts(str(tiny_base), prompts, tmp_path / "out", clip=None, **options)
    evaluate_prompts(str(tiny_base), prompts, tmp_path / "large", clip=None, **{**options, "options": large})
    assert Image.open(tmp_path / "large" / "00000.png").size == (32, 32)


def test_geneval_layout_and_judgement(tiny_base: Path, tiny_clip: Path, tiny_detector: Path, tmp_path: Path):
    requests = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "colors",
            "include": [{"class": "cow", "count": 1, "color": "red"}],
            "prompt": "a photo of a red cow",
        },
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, requests)))
    options = {
        "options": SamplingOptions(steps=1, guidance=1.0, seed=0),
        "num": 2,
        "on_batch": lambda done, total: None,
    }
    models = {"detector": str(tiny_detector), "clip": str(tiny_clip)}
    figures = evaluate_geneval(str(tiny_base), metadata, tmp_path / "out", **models, **options)
    assert sorted(p.name for p in (tmp_path / "out/00001/samples").iterdir()) == ["00000.png", "00001.png"]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == requests[1]
    records = read_results(tmp_path / "out/results.jsonl")
    assert len(records) == 4
    assert scores(records) == figures["geneval_with_this_detector"]
    assert figures["geneval_pictures"] == {"colors": 2, "single_object": 2}
    assert figures["geneval_missing_tasks"] == ["two_object", "counting", "position", "color_attr"]
    assert figures["geneval_missing_classes"] == []
    with pytest.raises(ModelError, match="both a detector and a CLIP"):
        evaluate_geneval(str(tiny_base), metadata, tmp_path / "x", detector="d", clip=None, **options)


def test_stretches():
    assert stretches([0, 1, 2, 5, 6, 9], 2) == [(0, 2), (2, 3), (5, 7), (9, 10)]


def test_names_of_older_detectors_are_known():
    older = [
        "sofa",
        "diningtable",
        "tvmonitor",
        "aeroplane",
        "motorbike",
        "pottedplant",
        "traffic_light",
        "Hair Dryer",
    ]
    assert [geneval_name(label) for label in older] == [
        "couch", "dining table", "tv", "airplane", "motorcycle", "potted plant", "traffic light", "hair drier",
    ]  # fmt: skip


def test_what_a_detector_cannot_find_is_named(caplog: pytest.LogCaptureFixture):
    requests = [
        {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "couch", "count": 1}]},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
    ]
    assert impossible(requests, {"dog", "couch"}) == {"missing_classes": [], "impossible_prompts": 0}
    assert not caplog.text
    assert impossible(requests, {"dog"}) == {"missing_classes": ["couch"], "impossible_prompts": 1}
    assert "lacks couch: 1 of 2 prompts" in caplog.text
    with pytest.raises(ModelError, match="knows no class of the prompts"):
        impossible(requests, {"LABEL_0"})


def test_a_detector_without_class_names_is_refused(tiny_detector: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_detector, tmp_path / "unnamed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its classes have no names \(LABEL_0"):
        Detector(str(folder))
    assert Detector(str(tiny_detector)).classes == {"bench", "cow"}


def test_scores_rest_on_pictures_of_every_task(caplog: pytest.LogCaptureFixture):
    records = [{"tag": tag, "correct": True} for tag in TASKS] + [{"tag": "colors", "correct": False}]
    assert coverage(records) == {"pictures": {**dict.fromkeys(sorted(TASKS), 1), "colors": 2}, "missing_tasks": []}
    assert not caplog.text
    assert coverage(records[:2])["missing_tasks"] == ["counting", "colors", "position", "color_attr"]
    assert "not the published figure" in caplog.text


@pytest.mark.parametrize(("detections", "empty", "warned"), [([0, 0, 0], 3, True), ([0, 2, 1], 1, False)])
def test_a_detector_that_finds_nothing_is_named(
    detections: list[int], empty: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Its scores are all 0.0, which looks like a model that draws nothing right."""
    request = {"tag": "counting", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    for number in range(3):
        image_file = write_request(tmp_path, number, request) / "00000.png"
        Image.new("RGB", (8, 8)).save(image_file)
    found = iter([[Found("dog", 0.95, (0, 0, 4, 4))] * number for number in detections])
    clip: Any = None
    records = judge_folder(tmp_path, lambda image: next(found), clip)
    assert coverage(records)["pictures_without_detections"] == empty
    assert (f"found nothing in {empty} of 3 images" in caplog.text) == warned


@pytest.mark.parametrize(
    "line", ['{"tag": "colors", "correct": "True"}', '{"tag": "colors", "correct": 2}', '{"tag": 3, "correct": true}', "3",
             '{"tag": "colors", "correct": null}', "[1]"],
)  # fmt: skip
def test_results_that_are_no_verdicts_are_one_line(line: str, tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"tag": "colors", "correct": true}\n' + line)
    with pytest.raises(ModelError, match=r"`correct` is|`tag` is|needs `tag` and `correct`"):
        read_results(path)


@pytest.mark.parametrize(
    "entry", [{"tag": "x", "include": "dog"}, {"tag": "x", "include": [{"class": "dog"}]}, {"tag": 1, "include": []},
              {"include": []}, {"tag": "x", "include": [], "exclude": [3]}],
)  # fmt: skip
def test_prompts_that_are_no_requests_are_one_line(entry: dict, tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"prompt": "a dog", **entry}))
    options = {"options": SamplingOptions(steps=1, guidance=1.0, seed=0), "num": 1, "detector": None, "clip": None}
    with pytest.raises(DataError, match="is not GenEval's metadata"):
        evaluate_geneval("micro", path, tmp_path / "out", **options, on_batch=lambda done, total: None)
    assert not (tmp_path / "out").exists()


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
WRONG_REQUESTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": None, "caption": "a dog"}, "`prompt` is missing or null"),
    ({"prompt": 5}, "`prompt` is 5; it has to be a text"),
    ({"tag": None}, "`tag` is missing or null"),
    ({"tag": ["colors"]}, r"`tag` is \['colors'\]"),
    ({"include": None}, "`include` is missing or null"),
    ({"include": {"class": "dog", "count": 1}}, "`include` is {.*a list"),
    ({"include": 3}, "`include` is 3; it has to be a list"),
    ({"include": ["dog"]}, r"`include\[0\]` is 'dog'"),
    ({"include": [DOG, None]}, r"`include\[1\]` is missing or null"),
    ({"exclude": None}, "`exclude` is missing or null"),
    ({"exclude": "dog"}, "`exclude` is 'dog'; it has to be a list"),
    ({"exclude": [{"class": "dog", "count": 1.5}]}, r"`exclude\[0\]\.count` is 1\.5"),
    ({"exclude": [{"count": 3}]}, r"`exclude\[0\]\.class` is missing or null"),
    *(
        ({"include": [DOG, {**CAT, "count": n}]}, r"`include\[1\]\.count` is .*whole number")
        for n in ("2", 0, -1, True, 2.0, None, [])
    ),
    *(({"include": [{**DOG, "class": name}]}, r"`include\[0\]\.class` is .*a text") for name in (3, None, ["dog"], {})),
    *(({"include": [{**DOG, "color": c}]}, r"`include\[0\]\.color` is .*one of red") for c in ("gray", None, 3, ["red"])),
    *(
        ({"include": [DOG, {**CAT, "position": p}]}, r"`include\[1\]\.position` is .*one of left of, right of")
        for p in (
            ["left of", 5], ["left of", 1], ["left of", -1], ["left of", "0"], ["left of", True], ["near", 0], ["left of"],
            ["left of", 0, 1], "left of", None, 0, [["left of"], 0],
        )
    ),
    ({"include": [{**DOG, "position": ["left of", 0]}, CAT]}, r"`include\[0\]\.position`"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_REQUESTS)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_fault_of_a_request_is_found_before_drawing_and_in_its_line(
    change: dict[str, Any], message: str, ending: str, tmp_path: Path
):
    right = {"prompt": "a dog and a cat", "tag": "two_object", "include": [DOG, CAT]}
    wrong = {key: value for key, value in {**right, **change}.items() if key != "prompt" or value is not None}
    path = tmp_path / f"m{ending}"
    lines = [json.dumps(entry) for entry in (right, wrong, right)]
    path.write_text("\n\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]")
    place = "line 3" if ending == ".jsonl" else "entry 1"
    options = {"options": SamplingOptions(steps=1, guidance=1.0, seed=0), "num": 1, "detector": None, "clip": None}
    with pytest.raises(DataError, match=f"{path} is not GenEval's metadata: {place}: {message}") as line:
        evaluate_geneval("/nowhere", path, tmp_path / "out", **options, on_batch=lambda done, total: None)
    assert "\n" not in str(line.value)
    assert not (tmp_path / "out").exists()
    folder = write_request(tmp_path / "judged", 0, wrong).parent
    clip: Any = None
    with pytest.raises(ModelError, match=f"not one of GenEval's requests: {message}.*; remove the folder {folder}"):
        judge_folder(tmp_path / "judged", lambda image: [], clip)


def test_the_official_requests_and_their_parts_are_right(shared: Path):
    official = [p.record for p in read_prompts(shared / "prompts/geneval_evaluation_metadata.jsonl")]
    place = {**CAT, "color": "red", "position": ["above", 0]}
    own = [{"prompt": "", "tag": "own", "include": [DOG, place]}, {"prompt": "none", "tag": "own", "include": []}]
    assert [request for request in official + own if request_fault(request)] == []
