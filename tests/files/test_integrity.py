"""A flipped bit, a cut file or an empty one is found before it is used, or the file is made again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_autoencoder

from davae.data.latent_cache.meta import CacheMeta, Team, is_whole, prepare_cache, read_meta, seal
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.data.latent_cache.write import ChannelStatistics, merge_index, merged_meta, save_latents, write_text
from davae.errors import DataError, ModelError
from davae.files.atomic import model_folder, save_tensors
from davae.files.checksums import SUMS, check_folder
from davae.pretrained.autoencoders import load_autoencoder, load_detail_vae
from davae.publish.assemble import read_upgrade
from davae.vae.detail_vae import DetailVAE

KEY = {"autoencoder": "a"}
LATENTS = np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype(np.float16)


def flip(path: Path, place: int = -1, bit: int = 3) -> None:
    """Flip one bit of a file; its size and the file next to it stay."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def write_shards(folder: Path) -> CacheMeta:
    """Write two shards of three items; a shard that is there and sound stays."""
    from davae.data.latent_cache.not_finite import is_finished

    prepare_cache(folder, KEY, Team())
    for number in range(2):
        if not is_finished(folder / f"latents-000-{number:05d}.safetensors"):
            rows = LATENTS[3 * number : 3 * number + 3]
            statistics = ChannelStatistics(4)
            statistics.update(torch.from_numpy(rows).float())
            captions = [f"caption {number} {row}" for row in range(3)]
            save_latents(folder, number, 0, rows, captions, [0, 1, 2], statistics, {}, [0, 1, 2])
    merge_index(folder)
    encode = lambda texts: (torch.tensor([[float(len(text))] * 16 for text in texts]),)  # noqa: E731
    meta = write_text(folder, encode, merged_meta(folder, KEY), batch_size=4, dtype="float16")
    return seal(folder, meta)


def read_all(folder: Path) -> None:
    for condition in ("text", "class"):
        cache = CachedLatents(folder, condition)
        found = collate_latents([cache[(i, 0)] for i in range(len(cache))])
        assert np.array_equal(found["latents"].numpy(), LATENTS.astype(np.float32))
    cache.embed(["", *cache.captions])


def test_every_flipped_byte_of_a_cache_is_found_or_changes_nothing(tmp_path: Path):
    """One bit anywhere in any file: what is read is what was written, or a line names the file."""
    write_shards(tmp_path / "cache")
    read_all(tmp_path / "cache")
    places = np.random.default_rng(1)
    for path in sorted((tmp_path / "cache").iterdir()):
        if path.name == "key.json":
            continue
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else 128
        for place in places.integers(min(header, len(whole) - 1), len(whole), 12):
            flip(path, int(place), int(places.integers(8)))
            try:
                read_all(tmp_path / "cache")
            except DataError as error:
                assert str(tmp_path / "cache") in str(error)  # noqa: PT017
            path.write_bytes(whole)


@pytest.mark.parametrize("name", ["latents-000-00001.safetensors", "text-00000.safetensors"])
def test_a_flipped_bit_in_a_latent_or_an_embedding_names_the_file(tmp_path: Path, name: str):
    write_shards(tmp_path)
    data = (tmp_path / name).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    big = "latents" if "latents" in header else "part_0"
    flip(tmp_path / name, begin + header[big]["data_offsets"][0] + 5)
    with pytest.raises(DataError, match=rf"{name}: row 0 of '{big}' is not what was written"):
        read_all(tmp_path)
    (tmp_path / name).unlink()  # the remedy that the line names
    assert not is_whole(tmp_path)
    write_shards(tmp_path)
    read_all(tmp_path)


def test_statistics_and_labels_of_a_cache_are_compared(tmp_path: Path):
    write_shards(tmp_path)
    text = (tmp_path / "meta.json").read_text()
    mean = json.loads(text)["mean"][0]
    (tmp_path / "meta.json").write_text(text.replace(str(mean), str(mean + 1)))
    with pytest.raises(DataError, match=r"meta\.json is not what was written"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(text)
    for name in ("labels.npy", "caption_of_item.npy"):
        flip(tmp_path / name, -8)
        with pytest.raises(DataError, match=f"{name} is not what was written"):
            read_all(tmp_path)
        flip(tmp_path / name, -8)
    read_all(tmp_path)


FILES = ["captions.npy", "caption_ends.npy", "labels.npy", "meta.json", "text-00000.safetensors"]


@pytest.mark.parametrize("left", [0, 20, None])
def test_empty_cut_and_missing_files_of_a_cache_are_made_again(tmp_path: Path, left: int | None):
    write_shards(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in [*FILES, "latents-000-00001.safetensors", "caption_of_item.npy", "caption_digests.npy", "key.json"]:
        path = tmp_path / name
        if left is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:left])
        assert (name == "key.json") or not is_whole(tmp_path)
        if name not in ("key.json",):
            with pytest.raises(DataError):
                read_all(tmp_path)
        write_shards(tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_cache_that_is_a_link_to_another_disk_stays_one(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    write_shards(tmp_path / "cache")
    prepare_cache(tmp_path / "cache", {"autoencoder": "b"}, Team())
    assert (tmp_path / "cache").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["key.json"]


def test_a_cache_without_checksums_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.numpy import load_file, save_file

    write_shards(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({n: v for n, v in load_file(path).items() if not n.endswith(".crc32")}, path, {"skipped": "{}"})
    values = json.loads((tmp_path / "meta.json").read_text())
    del values["crc32"], values["sums"]
    (tmp_path / "meta.json").write_text(json.dumps(values))
    read_all(tmp_path)


def test_space_for_a_cache_is_asked_for_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    from davae.data.latent_cache import write as cache_writer
    from davae.errors import RunError

    asked = cache_writer._asking_for_space(lambda images: torch.zeros(2, 4, 8, 8), tmp_path, 1000, 2)
    asked(torch.zeros(2, 3, 16, 16))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 500_000}))
    asked = cache_writer._asking_for_space(lambda images: torch.zeros(2, 4, 8, 8), tmp_path, 1000, 2)
    with pytest.raises(RunError, match=r"the latent cache needs 0\.00 GiB"):
        asked(torch.zeros(2, 3, 16, 16))


def test_the_caption_table_is_written_not_mapped(tmp_path: Path):
    """A write into a map of a file on a full disk kills the process; a limit on file sizes stands for the full disk."""
    import resource

    from davae.data.latent_cache.caption_table import pack, write_table
    from davae.errors import RunError

    child = os.fork()
    if not child:
        code = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
        try:
            write_table(tmp_path, [pack([f"{number} " * 1000 for number in range(9)])])
        except RunError as error:
            code = 0 if "cannot write" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    with model_folder(tmp_path / "pipeline") as partial:
        DetailVAE.from_base(tiny_autoencoder(), 8).save_pretrained(partial / "vae")
        (partial / "model_index.json").write_text("{}")
    return tmp_path / "pipeline" / "vae"


def test_a_flipped_bit_in_weights_or_statistics_of_a_model_folder_is_found(vae: Path):
    load_detail_vae(vae)
    weights, config = vae / "diffusion_pytorch_model.safetensors", vae / "config.json"
    for path, place in ((weights, -5), (weights, 3000), (config, config.read_text().index("detail_std"))):
        flip(path, place)
        for load in (load_detail_vae, lambda folder: load_autoencoder(str(folder)), lambda f: check_folder(f.parent)):
            with pytest.raises(ModelError, match=f"{path.name} is not what was written"):
                load(vae)
        flip(path, place)
    load_detail_vae(vae)
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "resolution": 64}))  # a change on purpose, and the remedy of the line
    sums = json.loads((vae.parent / SUMS).read_text())
    del sums["crc32"]["vae/config.json"]
    (vae.parent / SUMS).write_text(json.dumps(sums))
    assert load_detail_vae(vae).config["resolution"] == 64
    (vae.parent / SUMS).write_text("{")
    with pytest.raises(ModelError, match=r"checksums\.json is damaged"):
        load_detail_vae(vae)
    (vae.parent / SUMS).unlink()  # written by an earlier version
    load_detail_vae(vae)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_statistics_that_cannot_be_divided_by_are_refused(vae: Path, value: float):
    (vae.parent / SUMS).unlink()
    config = json.loads((vae / "config.json").read_text())
    for name in ("detail_std", "base_std"):
        wrong = {**config, name: [1.0, value] * (len(config[name] or [0] * 8) // 2)}
        (vae / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match=f"{name}: .* at channel 1; it must be finite"):
            load_detail_vae(vae)


def test_a_flipped_bit_in_a_file_of_tensors_is_found(tmp_path: Path):
    path = tmp_path / "upgrade.safetensors"
    about = {"format": "davae-upgrade-1", "class": "PixArtTransformer2DModel", "channels": "[4, 12]"}
    save_tensors(path, {"a": torch.ones(9), "b": torch.tensor(2, dtype=torch.bfloat16)}, about)
    assert set(read_upgrade(path)[1]) == {"a", "b"}
    flip(path)
    with pytest.raises(ModelError, match=r"upgrade\.safetensors: '[ab]' is not what was written"):
        read_upgrade(path)
    for left in (0, 50):
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(ModelError, match="is damaged"):
            read_upgrade(path)


def test_a_flipped_bit_in_the_metadata_of_an_upgrade_file_is_found(tmp_path: Path):
    path = tmp_path / "upgrade.safetensors"
    about = {"format": "davae-upgrade-1", "class": "A", "channels": "[4, 12]", "lora": "null"}
    save_tensors(path, {"a": torch.ones(9)}, about)
    data = path.read_bytes()
    for word, wrong in ((b"[4, 12]", b"[4, 13]"), (b"null", b"nulk"), (b'\\"a\\": ', b'\\"a\\"; ')):
        assert word in data
        path.write_bytes(data.replace(word, wrong))
        with pytest.raises(ModelError, match=r"upgrade\.safetensors: its (metadata is not|checksums are)"):
            read_upgrade(path)


def test_images_parts_and_shards_that_a_power_cut_left_empty_or_cut_are_drawn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    import tarfile

    from conftest import picture

    from davae.files.outputs import is_drawn

    for name in ("a.png", "a.jpg"):
        picture(0, 16, 16).save(tmp_path / name)
    np.save(tmp_path / "a.npy", np.zeros((250, 4)))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    for path in list(tmp_path.iterdir()):
        data = path.read_bytes()
        assert is_drawn(path)
        for left in (0, 1, 100, 600 if path.suffix == ".tar" else len(data) // 2):
            path.write_bytes(data[:left])
            assert not is_drawn(path), (path, left)
            assert f"{path.name} is empty or cut; it is drawn again" in caplog.text
    assert not is_drawn(tmp_path / "b.png")
