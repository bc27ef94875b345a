"""One line a family: expanded models of every class keep what they knew, save as that class, and train as they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import CASES

from davae import expand_transformer
from davae.backbones.expand import latent_channels, new_weight_masks
from davae.backbones.families import FAMILIES, family_by_class
from davae.backbones.trainable import choose_trainable
from davae.errors import ModelError
from davae.pretrained.shapes import read_shapes
from davae.publish.assemble import apply_upgrade, fuse, save_upgrade
from davae.recipes.sections import Lora

F64 = torch.float64
DETAIL = 8


def by_group(output: torch.Tensor, channels: int) -> torch.Tensor:
    """(B,g*c,H,W) -> (B,g,c,H,W): a model that predicts a variance returns two groups."""
    return output.unflatten(1, (-1, channels))


def latents(model: torch.nn.Module, extra: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    return torch.randn(2, latent_channels(model) + extra, 8, 8, generator=generator, dtype=F64).to(dtype)


def test_every_family_of_diffusers_has_a_case():
    assert set(CASES) == set(FAMILIES) - {"LightningDiT"}  # tested in test_lightning_dit.py


@pytest.mark.parametrize("name", CASES)
def test_step_zero_gradients_and_round_trip(name: str, tmp_path: Path):
    case, tolerance = CASES[name], CASES[name].tolerance
    base = case.build(name).to(
        torch.float32 if name.startswith("Kandinsky") else F64
    )  # its embedding takes no float64
    wide = expand_transformer(base, DETAIL)
    channels = latent_channels(base)
    assert type(wide) is type(base)
    assert latent_channels(wide) == channels + DETAIL

    x = latents(base, DETAIL)
    with torch.no_grad():
        expected = by_group(case.run(base, x[:, :channels]), channels)
    output = by_group(case.run(wide, x), channels + DETAIL)
    assert output.shape[1] == expected.shape[1]
    assert float(expected.abs().max()) > 1e-3
    assert float((output[:, :, :channels] - expected).abs().max()) < tolerance
    assert float(output[:, :, channels:].abs().max()) == 0.0

    (output - torch.ones_like(output)).square().sum().backward()
    parameters = dict(wide.named_parameters())
    for path, mask in new_weight_masks(wide).items():
        if path.endswith("weight"):
            gradient = parameters[path].grad
            assert gradient is not None
            reached = (gradient[mask.bool()] != 0).float().mean()
            assert float(reached) > 0.99, f"gradients reach {float(reached):.0%} of the new weights in {path}"

    with torch.no_grad():
        for path, mask in new_weight_masks(wide).items():
            parameters[path] += 0.1 * mask * torch.randn_like(mask)  # so that the detail part is told apart
        trained = case.run(wide, x)
    wide.save_pretrained(tmp_path)
    stock = type(base).from_pretrained(tmp_path, torch_dtype=base.dtype).eval()
    with torch.no_grad():
        again = case.run(stock, x)
    assert float((again - trained).abs().max()) < tolerance
    assert float(by_group(again, channels + DETAIL)[:, :, channels:].abs().max()) > 1e-3
    with pytest.raises(ValueError, match="expanded already"):
        expand_transformer(stock, DETAIL)


@pytest.mark.parametrize("name", CASES)
def test_lora_and_full_tuning(name: str, tmp_path: Path):
    case, family = CASES[name], family_by_class(name)
    base = case.build(name)
    before = {path: p.clone() for path, p in base.named_parameters()}
    x = latents(base, DETAIL)
    for lora in (Lora(rank=2), None):
        wide = expand_transformer(base, DETAIL)
        trained = choose_trainable(wide, lora)
        names = {path for path, p in wide.named_parameters() if p.requires_grad}
        whole = {
            f"{path}.{n}"
            for path in (family.embedder, family.head)
            for n, _ in wide.get_submodule(path).named_parameters()
        }
        assert whole <= names
        if lora is None:
            assert len(names) == len(list(base.parameters()))
        else:
            adapters = names - whole
            assert adapters
            assert all(".lora_A." in path or ".lora_B." in path for path in adapters)
            assert not [path for path in adapters if path.startswith((f"{family.embedder}.", f"{family.head}."))]
        optimizer = torch.optim.SGD(trained, lr=1e-4)
        for _ in range(2):  # LoRA's A gets a gradient once B has moved
            optimizer.zero_grad()
            (case.run(wide, x) - 1).square().mean().backward()
            optimizer.step()
        assert all(torch.equal(p, before[path]) for path, p in base.named_parameters())
        with torch.no_grad():
            expected = case.run(wide.eval(), x)
        save_upgrade(wide, tmp_path / "up.safetensors", lora, torch.float32)
        fused = fuse(wide)
        assert set(fused.state_dict()) == set(base.state_dict())
        again = apply_upgrade(base, tmp_path / "up.safetensors")
        with torch.no_grad():
            for model in (fused, again):
                difference = float((case.run(model, x) - expected).abs().max())
                assert difference < 1e-3 * float(expected.abs().max())


def test_an_unknown_class_names_the_nearest_ones():
    with pytest.raises(
        ValueError, match=r"FluxTransformer3DModel is not supported; .*FluxTransformer2DModel.*A Family in"
    ):
        family_by_class("FluxTransformer3DModel")


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "PixArtTransformer2DModel", "CogView4Transformer2DModel"])
def test_other_patches_and_channels(name: str):
    for patch, channels, detail in ((1, 2, 2), (4, 4, 12)):
        case = CASES[name]
        groups = case.config["out_channels"] // case.config["in_channels"]
        base = case.build(name, patch_size=patch, in_channels=channels, out_channels=groups * channels).double()
        wide = expand_transformer(base, detail)
        x = latents(base, detail)
        with torch.no_grad():
            expected = by_group(case.run(base, x[:, :channels]), channels)
            output = by_group(case.run(wide, x), channels + detail)
        assert float((output[:, :, :channels] - expected).abs().max()) < 1e-10
        assert not output[:, :, channels:].any()


def test_what_cannot_be_trained_yet_is_refused_by_name(tmp_path: Path):
    parts = {"transformer": ["diffusers", "Kandinsky5Transformer3DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Kandinsky5T2IPipeline", **parts}))
    for part in parts:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"widens a Kandinsky5Transformer3DModel, but davae cannot train one yet"):
        read_shapes(str(tmp_path))
