"""One copy of a checkpoint a machine: mapped when it is read, gathered by the first process alone when it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from davae.train import state_dict
from davae.train.run_folder import load_checkpoint
from davae.train.state_dict import load_optimizer_state, optimizer_state


def test_processes_that_write_nothing_copy_nothing(monkeypatch: pytest.MonkeyPatch):
    copied: list[int] = []

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    weight = torch.nn.Parameter(torch.ones(3))
    for main, copies in ((True, [3, 3]), (False, [])):
        copied.clear()
        monkeypatch.setattr(state_dict, "is_main", lambda main=main: main)
        state_dict.gather(weight)
        state_dict.gather_parts(weight, torch.zeros(3))
        assert copied == copies


def test_a_checkpoint_is_mapped_and_what_is_loaded_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: list[bool] = []
    plain = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: options.append(k.get("mmap", False)) or plain(*a, **k))
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    folder = tmp_path / "stage2-00000001"
    folder.mkdir()
    torch.save({"optimizer": optimizer_state(optimizer)}, folder / "state.pt")
    from davae.files.checksums import file_sum

    (folder / "meta.json").write_text(f'{{"stage": "stage2", "step": 1, "crc32": {file_sum(folder / "state.pt")}}}')
    state = load_checkpoint(folder)
    assert options == [True]
    again = torch.optim.AdamW([weight], lr=0.1)
    load_optimizer_state(again, state["optimizer"])
    moments = again.state[weight]["exp_avg"]
    assert (
        moments.untyped_storage().data_ptr() != state["optimizer"]["state"][0]["exp_avg"].untyped_storage().data_ptr()
    )
    expected = moments.clone()
    del state
    (folder / "state.pt").write_bytes(b"gone")
    assert torch.equal(moments, expected)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_the_step_of_a_fused_optimizer_is_where_its_parameter_is(
    monkeypatch: pytest.MonkeyPatch, fused: bool, device: str
) -> None:
    """Of FSDP2, whose parameters lie in pieces; `meta` takes the place of a GPU."""
    weight = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.param_groups[0]["fused"] = fused
    monkeypatch.setattr(state_dict, "DTensor", torch.nn.Parameter)
    monkeypatch.setattr(state_dict, "like", lambda value, parameter: value.to(parameter.device))
    stored = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "note": 1}
    groups = [{"params": [0], "lr": 0.2}]
    load_optimizer_state(optimizer, {"state": {0: stored}, "param_groups": groups})
    found = optimizer.state[weight]
    assert found["step"].device.type == device
    assert found["exp_avg"].device.type == "meta"
    assert found["note"] == 1
    assert optimizer.param_groups[0]["lr"] == 0.2
    if not fused:
        assert found["step"] == 7
        assert found["step"].data_ptr() != stored["step"].data_ptr(), (
            "the checkpoint's mapped file is deleted one day"
        )
