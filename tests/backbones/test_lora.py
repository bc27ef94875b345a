"""LoRA files of the base on the upgraded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILDERS, CASES
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_families import DETAIL, by_group, latents
from test_training import fails, run_cli

from davae import expand_transformer, widen_lora
from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import latent_channels
from davae.backbones.families import FAMILIES, family_by_class, family_of
from davae.backbones.trainable import choose_trainable
from davae.convert.lora import convert_lora
from davae.errors import ModelError
from davae.publish.assemble import without_lora
from davae.publish.export import loads_lora, lora_layers
from davae.recipes.sections import Lora

F64 = torch.float64
NO_LOADER = {
    *(
        "BriaTransformer2DModel",
        "CogView3PlusTransformer2DModel",
        "DiTTransformer2DModel",
        "GlmImageTransformer2DModel",
    ),
    *(
        "HunyuanDiT2DModel",
        "HunyuanImageTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "LuminaNextDiT2DModel",
    ),
    *("NucleusMoEImageTransformer2DModel", "OvisImageTransformer2DModel", "PRXTransformer2DModel"),
    "PixArtTransformer2DModel",
}
LOADERS = [name for name in CASES if loads_lora(FAMILIES[name].pipeline, name)]


def loader(name: str, model: torch.nn.Module) -> Any:
    """The LoRA half of a family's pipeline, without its other parts."""
    mixin = next(c for c in model_class(FAMILIES[name].pipeline).__mro__ if c is not LoraBaseMixin
                 and issubclass(c, LoraBaseMixin) and not issubclass(c, DiffusionPipeline))  # fmt: skip
    parts = {FAMILIES[name].component: model, "text_encoder": None, "text_encoder_2": None, "hf_device_map": {}}
    return type("Loader", (mixin,), {})(), parts


def test_families_whose_pipelines_load_no_lora():
    assert set(CASES) - set(LOADERS) == NO_LOADER


@pytest.mark.parametrize("name", LOADERS)
def test_lora_file_gives_the_trained_model(name: str, tmp_path: Path):
    case, family = CASES[name], family_by_class(name)
    base = case.build(name)
    trained = expand_transformer(base, DETAIL)
    for parameter in choose_trainable(trained, Lora(rank=2, alpha=4)):
        torch.nn.init.normal_(parameter, std=0.2)
    x = latents(base, DETAIL)
    with torch.no_grad():
        expected = case.run(trained.eval(), x)
    pipeline, parts = loader(name, trained)
    pipeline.save_lora_weights(tmp_path, **lora_layers(trained, family.component, torch.float32))
    without_lora(trained)
    for part, value in parts.items():
        setattr(pipeline, part, value)
    with torch.no_grad():
        bare = case.run(trained, x)
        pipeline.load_lora_weights(tmp_path)
        again = case.run(trained, x)
    scale = float(expected.abs().max())
    assert float((again - expected).abs().max()) < 1e-4 * scale
    assert float((bare - expected).abs().max()) > 1e-3 * scale


def base_lora(model: torch.nn.Module) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A random LoRA on everything that LoRA reaches and on embedder and head, attached to the model."""
    family = family_of(model)
    targets = rf"{family.embedder}|{family.head}|(?:.*\.)?(?:{'|'.join(family.lora_targets)})"
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    return config, get_peft_model_state_dict(model)


@pytest.mark.parametrize("name", CASES)
def test_base_part_with_lora_is_the_base_s_with_lora(name: str):
    case, tolerance = CASES[name], CASES[name].tolerance
    base = case.build(name).to(torch.float32 if name.startswith("Kandinsky") else F64)
    wide = expand_transformer(base, DETAIL)
    channels = latent_channels(base)
    x = latents(base, DETAIL)
    with torch.no_grad():
        plain = by_group(case.run(base, x[:, :channels]), channels)
    config, state = base_lora(base)
    prefix = family_by_class(name).component
    widened = widen_lora({f"{prefix}.{key}": tensor for key, tensor in state.items()}, wide)
    assert set(widened) == {f"{prefix}.{key}" for key in state}
    again = widen_lora(widened, wide)  # a LoRA that fits already is left alone
    assert all(again[key] is widened[key] for key in widened)
    inject_adapter_in_model(config, wide)
    set_peft_model_state_dict(wide, {key.removeprefix(f"{prefix}."): tensor for key, tensor in widened.items()})
    with torch.no_grad():
        expected = by_group(case.run(base, x[:, :channels]), channels)
        output = by_group(case.run(wide, x), channels + DETAIL)
    assert float((expected - plain).abs().max()) > 1e-3
    assert float((output[:, :, :channels] - expected).abs().max()) < tolerance * max(1, float(expected.abs().max()))
    assert not output[:, :, channels:].any()


def test_other_patches_channels_and_scales_of_detail():
    for patch, channels, detail in ((1, 2, 2), (4, 4, 12)):
        case = CASES["SD3Transformer2DModel"]
        base = case.build(
            "SD3Transformer2DModel", patch_size=patch, in_channels=channels, out_channels=channels
        ).double()
        wide = expand_transformer(base, detail)
        config, state = base_lora(base)
        inject_adapter_in_model(config, wide)
        set_peft_model_state_dict(wide, widen_lora(state, expand_transformer(case_of(base), detail)))
        x = latents(case_of(base), detail)
        with torch.no_grad():
            expected, output = case.run(base, x[:, :channels]), case.run(wide, x)
        assert float((output[:, :channels] - expected).abs().max()) < 1e-10
        assert not output[:, channels:].any()


def case_of(model: Any) -> Any:
    """A fresh model of the same config, without adapters."""
    return type(model).from_config(model.config).double()


def test_a_lora_of_another_shape_is_one_clear_line():
    case = CASES["SD3Transformer2DModel"]
    base = case.build("SD3Transformer2DModel")
    wide = expand_transformer(base, DETAIL)
    _, state = base_lora(case.build("SD3Transformer2DModel", num_attention_heads=3, caption_projection_dim=24))
    with pytest.raises(
        ModelError, match=r"has shape \(24, 2, 1, 1\), but its axis 0 must be 16: another model's LoRA"
    ):
        widen_lora(state, wide)
    _, state = base_lora(case.build("SD3Transformer2DModel", in_channels=8, out_channels=8))
    with pytest.raises(
        ModelError, match=r"'pos_embed.proj.lora_A.weight' has shape .* must be 12 \(or 4, its base's\)"
    ):
        widen_lora(state, wide)
    with pytest.raises(ModelError, match=r"adapts a layer that a SD3Transformer2DModel does not have"):
        widen_lora({"transformer.single_blocks.0.attn.lora_A.weight": torch.zeros(2, 16)}, wide)
    with pytest.raises(ModelError, match=r"'proj_out.lora_magnitude_vector' is not a LoRA weight"):
        widen_lora({"proj_out.lora_magnitude_vector": torch.zeros(16)}, wide)
    with pytest.raises(ModelError, match="was not upgraded"):
        widen_lora(state, base)
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 5)}
    assert widen_lora(text, wide) == text


def test_convert_lora_from_file_to_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A community file as diffusers writes it, with alpha in its settings: the stock pipeline takes what comes out."""
    BUILDERS["FluxTransformer2DModel"](tmp_path / "base")
    base = FluxPipeline.from_pretrained(tmp_path / "base")
    folder, wide = tmp_path / "upgraded", expand_transformer(base.transformer, DETAIL)
    FluxPipeline(**{**base.components, "transformer": wide}).save_pretrained(folder)
    config, state = base_lora(base.transformer)
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    file, out = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "wide" / "style.safetensors"
    run_cli("convert", "lora", str(file), "--upgraded", str(folder), "--out", str(out))
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert grown == {"transformer.x_embedder.lora_A.weight", "transformer.proj_out.lora_B.weight"}

    upgraded = FluxPipeline.from_pretrained(folder)
    plain = {name: p.clone() for name, p in upgraded.transformer.named_parameters()}
    upgraded.load_lora_weights(out)
    upgraded.fuse_lora()
    upgraded.unload_lora_weights()
    head = upgraded.transformer.proj_out.weight - plain["proj_out.weight"]
    update = state["proj_out.lora_B.weight"] @ state["proj_out.lora_A.weight"] * (3 / 2)
    torch.testing.assert_close(head.unflatten(0, (12, 4))[:4].flatten(0, 1), update, rtol=1e-4, atol=1e-4)
    assert not head.unflatten(0, (12, 4))[4:].any()

    state = {name: t[:, :-1].contiguous() if "to_q.lora_A" in name else t for name, t in before.items()}
    save_file(state, tmp_path / "wrong.safetensors")
    convert = ("convert", "lora", "--upgraded", str(folder), "--out", str(tmp_path / "x"))
    line = fails(capsys, *convert, str(tmp_path / "wrong.safetensors"))
    assert "does not fit" in line
    assert "another model's LoRA" in line
    assert "does not exist" in fails(capsys, *convert, str(tmp_path / "none.safetensors"))
    save_file({name: t * float("nan") for name, t in before.items()}, tmp_path / "nan.safetensors")
    assert "contains NaN" in fails(capsys, *convert, str(tmp_path / "nan.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    assert "cannot be read" in fails(capsys, *convert, str(tmp_path / "broken.safetensors"))


def test_kohya_files_keep_their_alpha(tmp_path: Path):
    """A U-Net's file in kohya's layout: alpha goes into B, and the base part is the base's with that file."""
    case = CASES["UNet2DConditionModel"]
    base = case.build("UNet2DConditionModel")
    wide = expand_transformer(base, DETAIL)
    channels, x = latent_channels(base), latents(base, DETAIL)
    layers = [name for name, _ in base.named_modules() if name.endswith("attn1.to_v")]
    state = {}
    for layer in layers:
        key = f"lora_unet_{layer.replace('.', '_')}"
        width = base.get_submodule(layer).weight.shape
        state[f"{key}.lora_down.weight"] = 3 * torch.randn(2, width[1])
        state[f"{key}.lora_up.weight"] = 3 * torch.randn(width[0], 2)
        state[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "kohya.safetensors")
    (tmp_path / "unet").mkdir()
    wide.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    convert_lora(tmp_path / "kohya.safetensors", str(tmp_path), tmp_path / "wide.safetensors")

    def with_lora(model: Any, file: Path) -> torch.Tensor:
        loaded, alphas = StableDiffusionPipeline.lora_state_dict(str(file))
        StableDiffusionPipeline.load_lora_into_unet(loaded, alphas, model)
        with torch.no_grad():
            return case.run(model, x[:, : latent_channels(model)])

    assert isinstance(base, UNet2DConditionModel)
    with torch.no_grad():
        plain = case.run(base, x[:, :channels])
    expected = with_lora(base, tmp_path / "kohya.safetensors")
    output = with_lora(wide, tmp_path / "wide.safetensors")
    moved = float((expected - plain).abs().max())
    assert moved > 1e-3
    assert float((output[:, :channels] - expected).abs().max()) < 1e-2 * moved
