"""Open files of tar shards: few at a time, and each read gets the bytes of its own shard."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from test_sources import png, write_tar

from davae.data.options import SourceOptions
from davae.data.shards import tar_source
from davae.data.shards.tar_source import TarSource


def open_files(folder: Path) -> int:
    """Count files below a folder that this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


def shards(folder: Path, count: int, side: int = 200) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:04}.tar" for number in range(count)]
    for number, path in enumerate(paths):
        write_tar(path, {f"{number}.png": png(picture(number, side, side)), f"{number}.txt": str(number).encode()})
    return paths


listed = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux")


@listed
def test_not_all_shards_are_open_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    source = TarSource(shards(folder, 270, 1), SourceOptions())
    for index in range(270):
        assert source.size(index) == (1, 1)
    assert 0 < open_files(folder) <= 256


@listed
def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tar_source.lru_cache(3)(tar_source._open_shard.__wrapped__)
    monkeypatch.setattr(tar_source, "_open_shard", small)
    folder = tmp_path / "set"
    source = TarSource(shards(folder, 8), SourceOptions())
    copy = pickle.loads(pickle.dumps(source))
    assert copy._token is not source._token
    for one in (source, copy, source):
        for index in range(8):
            assert one.load(index)[1] == str(index)
            assert one.size(index) == (200, 200)
            assert open_files(folder) <= 3
    assert open_files(folder) == 3


def test_an_image_is_read_on_after_its_shard_was_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives the number of a closed file to the next that is opened."""
    monkeypatch.setattr(tar_source, "_open_shard", tar_source.lru_cache(1)(tar_source._open_shard.__wrapped__))
    monkeypatch.setattr(tar_source, "SMALL", 0)
    monkeypatch.setattr(tar_source, "PREFIX", 16)
    source = TarSource(shards(tmp_path / "set", 2), SourceOptions())
    begun = [source._image(index) for index in range(2)]
    read = [b"", b""]
    for _ in range(10):
        for index in range(2):
            read[index] += begun[index].read(16)
    for index in range(2):
        assert read[index] == (source.sidecar(index, "picture") or b"")[:160]
    parts = [source.parts(index, [(0, 16), (16, 16)]) for index in range(2)]
    assert [next(parts[0]), next(parts[1]), next(parts[0]), next(parts[1])] == [
        read[0][:16],
        read[1][:16],
        read[0][16:32],
        read[1][16:32],
    ]


def test_a_shard_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_tar(tmp_path / "new.tar", {"0.png": png(picture(seed))})
        (tmp_path / "new.tar").replace(tmp_path / "a.tar")
        found = TarSource([tmp_path / "a.tar"], SourceOptions()).load(0)[0]
        assert np.array_equal(np.asarray(found), np.asarray(picture(seed)))
