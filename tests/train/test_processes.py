"""Processes of one launch: what the first one does alone, and other data in one of them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import picture

from davae.data.images import ImageDataset
from davae.data.latent_cache.meta import Team, read_meta, seal
from davae.data.latent_cache.read import CachedLatents
from davae.data.latent_cache.shard_files import latent_shards
from davae.data.latent_cache.write import write_latents, write_text
from davae.data.sources import open_source
from davae.dataset.opened import open_pictures
from davae.errors import DataError
from davae.recipes.sections import Data
from davae.runs.cache import check_same_key
from davae.train import distributed as ranks
from davae.train.loop import Periodic, Trainer
from davae.train.run_folder import BEST, Best, RunFolder


def _run(rank: int, count: int, meeting: Path, work: Callable[[int], Any], answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    try:
        answers.put((rank, work(rank)))
    except DataError as error:
        answers.put((rank, f"DataError: {error}"))
    finally:
        dist.destroy_process_group()


def in_processes(work: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `work(rank)` returns in each of some gloo processes, or the line of its DataError."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, count, folder / "meeting", work, answers)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(count)]


def images(folder: Path, count: int, width: int = 16) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        picture(number, width, 16).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"number {number}")
    return folder


def opened(folders: list[Path], rank: int) -> int:
    return len(open_pictures(Data(source=str(folders[rank]), holdout=0.0), 16).train)


def test_the_first_process_works_alone_and_the_others_wait(tmp_path: Path):
    def work(rank: int) -> bool:
        def slow() -> None:
            time.sleep(0.3)
            (tmp_path / f"by-{rank}").touch()

        ranks.on_main(slow)
        return (tmp_path / "by-0").exists()

    assert in_processes(work, tmp_path) == [True, True]
    assert not (tmp_path / "by-1").exists()


def test_waiting_for_the_first_process_outlives_the_time_out_of_collectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The groups of a launch give up after a while; the wait for a report does not."""
    seen: list[Any] = []
    group = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda **options: seen.append(options) or group(**options))

    def work(rank: int) -> Any:
        ranks.patient_barrier()
        ranks.patient_barrier()
        return seen

    for options in in_processes(work, tmp_path):
        assert len(options) == 1, "one group, made once"
        assert options[0]["timeout"].days >= 30
        assert options[0]["backend"] == "gloo", "on a GPU no kernel waits"


def test_a_patient_value_is_awaited_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    send = dist.broadcast_object_list
    monkeypatch.setattr(ranks, "patient_barrier", lambda: calls.append("wait"))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box: calls.append("send") or send(box))

    def work(rank: int) -> Any:
        values = [ranks.from_main(rank + 5, patient=True), ranks.from_main(rank)]
        return [*values, *calls]

    assert in_processes(work, tmp_path) == [[5, 0, "wait", "send", "send"]] * 2
    assert ranks.from_main(3, patient=True) == 3


def test_other_data_in_one_process_is_found_when_it_is_opened(tmp_path: Path):
    whole = images(tmp_path / "whole", 8)
    assert in_processes(partial(opened, [whole, images(tmp_path / "copy", 8)]), tmp_path) == [8, 8]
    fewer = images(tmp_path / "fewer", 7)
    for line in in_processes(partial(opened, [whole, fewer]), tmp_path / "fewer"):
        assert "found 7 images, process 0 on" in line
        assert "'07.png' is in one alone; give all processes the same files" in line
        assert line.startswith("DataError: data.source: ")
    other = images(tmp_path / "other", 8)
    (other / "03.txt").write_text("another caption")
    for line in in_processes(partial(opened, [whole, other]), tmp_path / "other"):
        assert "process 1 on" in line
        assert "has images of other sizes, captions or buckets than process 0" in line


def test_another_cache_key_is_found_before_a_shard_is_written(tmp_path: Path):
    def work(rank: int) -> Any:
        return check_same_key({"autoencoder": "a", "data": f"d{rank // 2}"})

    assert in_processes(work, tmp_path) == [None, None]
    (tmp_path / "three").mkdir()
    for line in in_processes(work, tmp_path / "three", 3):
        assert "cache: process 2 on" in line
        assert "as these differ: the images or their captions; give all" in line


def test_shards_of_other_data_are_refused_and_made_again(tmp_path: Path):
    """What a process with other data left behind: a shard in the place of one of ours, and one too many."""
    ours, theirs = images(tmp_path / "ours", 40), images(tmp_path / "theirs", 60)
    options: dict[str, Any] = {"variants": 1, "batch_size": 4, "dtype": "float32"}

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return batch[:, :, ::4, ::4]

    def embed(captions: list[str]) -> tuple[torch.Tensor, ...]:
        return (torch.ones(len(captions), 1),)

    def write(folder: Path, data: Path, key: dict[str, str], team: Team) -> Any:
        pictures = ImageDataset(open_source(str(data), 16), range(len(list(data.glob("*.png")))), 16)
        meta = write_latents(folder, pictures, encode, key=key, team=team, **options)
        return seal(folder, write_text(folder, embed, meta, batch_size=4, dtype="float32"))

    target, clean = tmp_path / "cache", tmp_path / "clean"
    write(clean, ours, {"data": "ours"}, Team())
    write(tmp_path / "wrong", theirs, {"data": "theirs"}, Team())
    target.mkdir()
    (target / "key.json").write_text('{"data": "ours"}')
    for shard in latent_shards(tmp_path / "wrong"):
        (target / shard.name).write_bytes(shard.read_bytes())
    assert len(latent_shards(target)) > len(latent_shards(clean))
    write(target, ours, {"data": "ours"}, Team())
    assert read_meta(target) == read_meta(clean)
    assert len(CachedLatents(target)) == 40

    def late() -> None:  # the other process writes while this one does
        shard = latent_shards(tmp_path / "wrong")[0]
        (target / shard.name).write_bytes(shard.read_bytes())

    (target / "meta.json").unlink()
    with pytest.raises(
        DataError, match=r"latents-000-00000.safetensors was written from other data by another process"
    ):
        write(target, ours, {"data": "ours"}, Team(0, 1, late))
    write(target, ours, {"data": "ours"}, Team())
    assert read_meta(target) == read_meta(clean)


class Noticed:
    """Part of a Trainer: what is due at a step."""

    step = 4
    _periodic = Trainer._periodic

    def __init__(self, rank: int, folder: Path):
        self.periodic = [
            Periodic(2, lambda step: {BEST: 0.5 + rank * 1e-7, "step": float(step)}),
            Periodic(3, lambda step: {"never": 0.0}),
        ]
        self.best = Best(folder, "stage2")
        self.best.value = 0.5 + 5e-8


def test_processes_agree_on_the_best_checkpoint(tmp_path: Path):
    """Rounding differs by device; saving is collective, so that one process alone would wait for ever."""
    (tmp_path / "checkpoints").mkdir()

    def work(rank: int) -> tuple[dict[str, float], bool]:
        trainer = Noticed(rank, tmp_path)
        found = trainer._periodic()
        return found, trainer.best.improved(found, trainer.step)

    assert in_processes(work, tmp_path) == [({BEST: 0.5, "step": 4.0}, True)] * 2


def test_a_step_is_done_for_all_where_it_is_for_the_first_process(tmp_path: Path):
    """Other machines see a shared folder's files late; one that trained alone would wait for ever."""

    def work(rank: int) -> list[bool]:
        folder: Any = SimpleNamespace(done=lambda step: rank == 0 and step == "stage1")
        return [RunFolder.due(folder, step) for step in ("stage1", "stage2")]

    assert in_processes(work, tmp_path) == [[False, True]] * 2
