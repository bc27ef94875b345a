"""The global batch over any number of processes, and the documented launches at theirs."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

import davae.recipes
from davae.data.batches import Batches, Passes, chosen_workers
from davae.errors import RunError
from davae.recipes import Recipe, load_recipe, shipped_recipes
from davae.recipes.sections import Hardware, Stage1
from davae.train.random import SampleRandom
from davae.train.shares import Share, share_of_step

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(davae.recipes.__file__).parent / "accelerate"


def share(batch: int, accumulation: int, processes: int, stated: int | None = None) -> Share:
    hardware = None if stated is None else Hardware(gpu="h100-80gb", count=stated)
    settings = Stage1(max_steps=1, batch_size=batch, accumulation=accumulation)
    return share_of_step(settings, "stage1", processes, hardware)


# -- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "stated", "images", "passes"),
    [
        (4, 4, 1, None, 4, 4),
        (4, 4, 2, None, 2, 4),  # divides: passes as the recipe has them
        (4, 4, 8, 1, 2, 1),
        (4, 4, 16, 1, 1, 1),
        (8, 2, 1, 8, 1, 16),  # one GPU of the eight that were planned: no more images at a time
        (8, 2, 16, 8, 1, 1),
        (128, 1, 16, 1, 8, 1),
        (32, 4, 4, 8, 4, 8),
    ],
)
def test_the_global_batch_is_kept(
    batch: int, accumulation: int, processes: int, stated: int, images: int, passes: int
):
    found = share(batch, accumulation, processes, stated)
    assert found == Share(images, passes)
    assert found.images * found.passes * processes == batch * accumulation
    assert batch % found.images == 0


def test_what_cannot_be_divided_is_one_line():
    with pytest.raises(
        RunError, match=r"stage1\.batch_size: the global batch of 4 x 4 = 16 cannot be divided over 3 pro"
    ):
        share(4, 4, 3)
    with pytest.raises(RunError, match=r"over 32 processes"):
        share(4, 4, 32)


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if isinstance(load_recipe(n), Recipe)])
def test_shipped_recipes_run_on_one_two_and_eight_machines(name: str):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    for processes in {1, 2, 8, 16} if recipe.hardware is not None else {1, 2, 4, 8}:
        for settings in (recipe.stage1, recipe.stage2):
            found = share_of_step(settings, "stage", processes, recipe.hardware)
            assert found.images * found.passes * processes == settings.batch_size * settings.accumulation


# -- the same samples with the same noise ----------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [False, True])
def test_any_division_trains_on_the_same_samples_with_the_same_noise(buckets: bool):
    batch, accumulation, steps, seed = 4, 4, 5, 3
    groups = np.asarray([0, 1] * 16 + [0] * 5, np.int16) if buckets else None
    length = 37
    whole = Batches(length, batch, seed=seed, start=0, stop=steps * accumulation, groups=groups)
    expected = [sorted(item for n in range(s * 4, s * 4 + 4) for item in whole.batch(n)) for s in range(steps)]
    noise = {}
    for number in range(steps * accumulation):
        draws = SampleRandom(seed, "stage1", number, 0, batch)
        noise |= dict(zip(whole.batch(number), draws.normal(2).tolist(), strict=True))
    for processes, start in product((1, 2, 4, 8, 16), (0, 2)):
        part = share(batch, accumulation, processes, 1)
        options = {"seed": seed, "start": start * accumulation, "stop": steps * accumulation, "groups": groups}
        ranks = [
            list(Passes(length, batch, own=part.images, rank=rank, ranks=processes, **options))
            for rank in range(processes)
        ]
        for step in range(start, steps):
            own = [passes[(step - start) * part.passes :][: part.passes] for passes in ranks]
            assert sorted(item for passes in own for items in passes for item in items) == expected[step]
            for rank, passes in enumerate(own):
                for number, items in enumerate(passes):
                    place = ((step * part.passes + number) * processes + rank) * part.images
                    draws = SampleRandom(seed, "stage1", *divmod(place, batch), part.images)
                    assert draws.normal(2).tolist() == [noise[item] for item in items]
                    if groups is not None:
                        assert len({int(groups[index]) for index, _ in items}) == 1, "one bucket a pass"


def test_a_recipe_that_divides_takes_the_batches_as_before():
    old = list(Batches(50, 2, seed=1, start=3, stop=20, rank=1, ranks=3))
    assert list(Passes(50, 6, seed=1, start=3, stop=20, own=2, rank=1, ranks=3)) == old


# -- workers ---------------------------------------------------------------------------------------------------


def test_workers_are_chosen_from_the_cores(monkeypatch: pytest.MonkeyPatch):
    for cores, local, expected in ((1, 1, 0), (2, 1, 0), (4, 1, 2), (96, 8, 8), (16, 8, 0), (64, 1, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert chosen_workers(None) == expected
        assert chosen_workers(3) == 3
    assert load_recipe("micro").data.num_workers is None


# -- documented launches ---------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Shell lines of a document, continued ones joined."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def processes_of(words: list[str]) -> int:
    """What `accelerate launch` starts: its own option, else its config's."""
    if "--num_processes" in words:
        return int(words[words.index("--num_processes") + 1])
    config = Path(words[words.index("--config_file") + 1]).name
    return int(yaml.safe_load((CONFIGS / config).read_text())["num_processes"])


def launches() -> list[tuple[str, int, list[str]]]:
    """(where, processes, words after `upgrade`) of every documented launch of several processes."""
    found = []
    text = (ROOT / "docs" / "cluster.md").read_text()
    run = re.search(r'^RUN="(.*)"$', text, re.M)
    assert run is not None
    for line in commands(text):
        line = line.replace("$RUN", run[1])
        if line.startswith(("accelerate launch", "davae upgrade")):
            words = shlex.split(line, comments=True)
            processes = processes_of(words) if words[0] == "accelerate" else 1
            found.append(("cluster.md", processes, words[words.index("upgrade") + 1 :]))
    slurm = (ROOT / "examples" / "upgrade.sbatch").read_text()
    size = {name: int(re.search(rf"#SBATCH --{name}=(\d+)", slurm)[1]) for name in ("nodes", "ntasks-per-node")}
    for line in commands(slurm):
        if "davae upgrade" in line and not line.startswith("#"):
            words = shlex.split(line[line.index("davae upgrade") :].rstrip("'"))
            found.append(("upgrade.sbatch", size["nodes"] * size["ntasks-per-node"], words[2:]))
    sky = yaml.safe_load((ROOT / "examples" / "sky.yaml").read_text())
    processes = sky["num_nodes"] * int(sky["resources"]["accelerators"].partition(":")[2])
    for line in commands(sky["run"]):
        if "davae upgrade" in line:
            found.append(("sky.yaml", processes, shlex.split(line[line.index("davae upgrade") :])[2:]))
    return found


LAUNCHES = launches()


def test_every_launch_is_found():
    assert len(LAUNCHES) >= 8
    assert {where for where, *_ in LAUNCHES} == {"cluster.md", "upgrade.sbatch", "sky.yaml"}
    assert max(processes for _, processes, _ in LAUNCHES) == 16


@pytest.mark.parametrize("number", range(len(LAUNCHES)))
def test_documented_launches_keep_the_papers_batch(number: int):
    _, processes, words = LAUNCHES[number]
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    recipe = load_recipe(words[0], overrides)
    assert isinstance(recipe, Recipe)
    for settings, name, paper in ((recipe.stage1, "stage1", 16), (recipe.stage2, "stage2", 128)):
        found = share_of_step(settings, name, processes, recipe.hardware)
        images = found.images * found.passes * processes
        assert images == settings.batch_size * settings.accumulation
        if recipe.name.startswith("sd35"):
            assert images == paper, "Tab. S1"
