"""DetailVAE and expand_transformer: warm starts, equality with the pretrained parts, save and load."""

from __future__ import annotations

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import text_inputs, tiny_autoencoder, tiny_transformer
from diffusers import AutoencoderOobleck, AutoencoderTiny, SD3Transformer2DModel
from peft import LoraConfig
from test_autoencoders import TINY
from torch import nn

from davae import DetailVAE, expand_transformer
from davae.backbones.expand import by_channel, new_weight_masks
from davae.backbones.null_tokens import repeat_last_token
from davae.backbones.trainable import choose_trainable
from davae.publish.assemble import apply_upgrade, fuse, save_upgrade
from davae.recipes.sections import Lora
from davae.vae.blocks import DetailDown, DetailUp, downsample
from davae.vae.warm_start import filter_shares

F64 = torch.float64
SIZES = [(2, 4, False), (2, 12, True), (4, 8, False)]


@pytest.mark.parametrize(("scale", "detail", "quant"), SIZES)
def test_base_part_is_the_pretrained_latent_normalised(scale: int, detail: int, quant: bool):
    base = tiny_autoencoder(quant).double()
    vae = DetailVAE.from_base(base, detail, scale)
    images = torch.rand(2, 3, 16 * scale, 16 * scale, dtype=F64) * 2 - 1
    posterior = vae.encode(images).latent_dist
    expected = (base.encode(downsample(images, scale)).latent_dist.mode() - 0.1) * 0.7
    assert posterior.mode().shape == (2, 4 + detail, 8, 8)
    for latents in (posterior.mode(), posterior.sample()):
        torch.testing.assert_close(vae.layout.split(latents)[0], expected, rtol=0, atol=1e-12)
    assert vae.decode(posterior.mode()).sample.shape == images.shape
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 2 * scale


@pytest.mark.parametrize(("scale", "detail", "quant"), SIZES)
def test_decoder_starts_as_the_base_decoder_on_the_enlarged_latent(scale: int, detail: int, quant: bool):
    base = tiny_autoencoder(quant).double()
    vae = DetailVAE.from_base(base, detail, scale)
    z = torch.randn(1, 4, 6, 6, dtype=F64)
    features = vae.decoder.conv_in(vae.layout.join(z, z.new_zeros(1, detail, 6, 6)))
    enlarged = F.interpolate(z, scale_factor=scale, mode="nearest")
    expected = base.decoder.conv_in(base.post_quant_conv(enlarged) if quant else enlarged)
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    torch.testing.assert_close(features[inside], expected[inside], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "detail"), [(2, 4), (2, 8), (2, 12), (2, 16), (4, 16)])
def test_an_unfolded_start_reads_the_high_resolution_latent(scale: int, detail: int):
    """z' = z + M^+ (z_d - M z) by dense matrices on the fine grid, then the base decoder's first convolution."""
    base = tiny_autoencoder().double()
    vae = DetailVAE.from_base(base, detail, scale, start="unfolded")
    z, z_d = torch.randn(1, 4, 6, 6, dtype=F64), torch.randn(1, detail, 6, 6, dtype=F64)
    shares = filter_shares(vae.layout)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * (detail // scale**2))
    fine = F.interpolate(z, scale_factor=scale, mode="nearest")
    told = F.pixel_shuffle(z_d, scale) - torch.einsum("kc,bchw->bkhw", shares, fine)
    guess = fine + torch.einsum("ck,bkhw->bchw", torch.linalg.pinv(shares), told)
    features = vae.decoder.conv_in(vae.layout.join(z, z_d))
    torch.testing.assert_close(features, base.decoder.conv_in(guess), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 4])
def test_unfolded_with_room_for_everything_is_the_base_at_the_high_resolution(scale: int):
    base = AutoencoderTiny(**TINY).double()
    vae = DetailVAE.from_base(base, scale**2 * TINY["latent_channels"], scale, start="unfolded")
    images = torch.rand(2, 3, 16 * scale, 16 * scale, dtype=F64) * 2 - 1
    with torch.no_grad():
        raw = vae.encode_raw(images)
        decoded = vae.decode_raw(vae.layout.join(raw.z, raw.mean))
        expected = base.decode(base.encode(images).latents).sample
        group_mean = raw.mean.unflatten(1, (-1, scale**2)).mean(2)
        pooled = F.avg_pool2d(base.encode(images).latents, scale)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(group_mean, pooled, rtol=0, atol=1e-12)  # what Eq. 4 pulls towards z


def test_an_unfolded_start_needs_whole_cells():
    with pytest.raises(ValueError, match="divisible by 16"):
        DetailVAE.from_base(tiny_autoencoder(), 8, 4, start="unfolded")


def test_trunks_start_from_the_pretrained_weights():
    base = tiny_autoencoder()
    vae = DetailVAE.from_base(base, 8)
    for mine, theirs, new in (
        (vae.detail_encoder, base.encoder, "conv_out"),
        (vae.decoder, base.decoder, "conv_in"),
        (vae.base_encoder, base.encoder, "-"),
    ):
        state = mine.state_dict()
        assert all(torch.equal(state[n], v) for n, v in theirs.state_dict().items() if not n.startswith(new))


def test_statistics_normalise_the_detail_part_and_survive_saving(tmp_path: Path):
    vae = DetailVAE.from_base(tiny_autoencoder().double(), 8)
    images = torch.rand(2, 3, 32, 32, dtype=F64) * 2 - 1
    raw = vae.encode_raw(images)
    mean, std = torch.randn(8, dtype=F64), torch.rand(8, dtype=F64) + 0.5
    vae.set_detail_statistics(mean, std)
    _, z_d = vae.layout.split(vae.encode(images).latent_dist.mode())
    torch.testing.assert_close(z_d, (raw.mean - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))
    vae.save_pretrained(tmp_path)
    again = DetailVAE.from_pretrained(tmp_path, torch_dtype=F64)
    latents = again.encode(images).latent_dist.mode()
    torch.testing.assert_close(latents, vae.encode(images).latent_dist.mode(), rtol=0, atol=1e-12)
    torch.testing.assert_close(again.decode(latents).sample, vae.decode(latents).sample, rtol=0, atol=1e-12)
    assert again.config.detail_mean == vae.config.detail_mean


def test_sampling_noise_has_the_posterior_width_after_normalisation():
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    vae.set_detail_statistics(torch.zeros(8), torch.full((8,), 2.0))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    raw = vae.encode_raw(images)
    posterior = vae.encode(images).latent_dist
    _, std = vae.layout.split(posterior.std)
    torch.testing.assert_close(std, (0.5 * raw.logvar).exp() / 2)
    assert torch.equal(vae.layout.split(posterior.std)[0], torch.zeros(1, 4, 8, 8))


def test_slicing_and_tiling(tmp_path: Path):
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    images = F.interpolate(torch.rand(2, 3, 6, 6) * 2 - 1, (96, 80), mode="bicubic").clamp(-1, 1)
    whole = vae.encode(images).latent_dist.mode()
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(images).latent_dist.mode(), whole, rtol=1e-4, atol=1e-5)
    vae.disable_slicing()
    decoded = vae.decode(whole).sample
    vae.enable_tiling(48, 0.5)
    assert vae.encode(images).latent_dist.mode().shape == whole.shape
    tiled = vae.decode(whole).sample
    assert tiled.shape == decoded.shape
    # blended seams: no column steps more than the untiled picture's own steepest columns, with some slack
    step = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2)).max()  # noqa: E731
    assert float(step(tiled)) < 2 * float(step(decoded))


def test_gradient_checkpointing_changes_no_gradient():
    vae = DetailVAE.from_base(tiny_autoencoder().double(), 8).train()
    images = torch.rand(1, 3, 32, 32, dtype=F64)

    def gradients() -> list[torch.Tensor]:
        vae.zero_grad()
        raw = vae.encode_raw(images)
        vae.decode_raw(vae.layout.join(raw.z, raw.mean)).square().sum().backward()
        return [p.grad.clone() for p in vae.parameters() if p.grad is not None]

    plain = gradients()
    vae.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)


def test_only_detail_encoder_and_decoder_train():
    vae = DetailVAE.from_base(tiny_autoencoder(quant=True), 8)
    trained = {name.split(".")[0] for name, p in vae.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in vae.named_parameters() if not p.requires_grad}
    assert trained == {"detail_encoder", "decoder"}
    assert frozen == {"base_encoder", "base_quant_conv"}
    assert not vae.train().base_encoder.training


def test_shortcuts_are_parameter_free_where_channels_divide():
    assert DetailDown(16, 16, 2).shortcut is None
    assert DetailDown(16, 24, 2).shortcut is not None  # 64 features do not fall into 24 groups
    assert DetailUp(16, 8, 2).shortcut is None
    assert DetailUp(12, 8, 2).shortcut is not None
    features = torch.randn(1, 16, 4, 4)
    down = DetailDown(16, 16, 2)
    torch.nn.init.zeros_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    expected = F.pixel_unshuffle(features, 2).view(1, 16, 4, 2, 2).mean(2)
    torch.testing.assert_close(down(features), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((6, 2), "multiple of the base's 4"), ((8, 3), "power of two"), ((0, 2), "positive")],
)
def test_impossible_sizes(arguments: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=message):
        DetailVAE.from_base(tiny_autoencoder(), *arguments)


def test_wrong_inputs_name_what_was_found():
    vae = DetailVAE.from_base(tiny_autoencoder(), 8)
    with pytest.raises(ValueError, match="30x32; both sides must be divisible by 4"):
        vae.encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="takes 4 base \\+ 8 detail"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="AutoencoderOobleck is not supported"):
        DetailVAE.from_base(AutoencoderOobleck(encoder_hidden_size=8, decoder_channels=8), 8)


# -- expand_transformer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
def test_step_zero_equals_the_pretrained_transformer(tmp_path: Path, dual: bool):
    base = tiny_transformer(dual=dual).double()
    wide = expand_transformer(base, 8)
    latents, text = torch.randn(2, 12, 8, 8, dtype=F64), text_inputs(2)
    expected = base(hidden_states=latents[:, :4], **text).sample
    velocity = wide(hidden_states=latents, **text).sample
    assert float((velocity[:, :4] - expected).abs().max()) < 1e-12
    assert float(velocity[:, 4:].abs().max()) == 0.0
    assert float(expected.abs().max()) > 1e-3
    wide.save_pretrained(tmp_path)
    stock = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=F64)
    assert type(wide) is SD3Transformer2DModel
    again = stock(hidden_states=latents, **text).sample
    torch.testing.assert_close(again, velocity, rtol=0, atol=1e-12)
    assert float(again[:, 4:].abs().max()) == 0.0
    assert (stock.config.in_channels, stock.config.out_channels) == (12, 12)
    with pytest.raises(ValueError, match="expanded already"):
        expand_transformer(stock, 8)


def test_expanding_shares_storage_and_leaves_the_original_alone():
    base = tiny_transformer()
    before = {name: p.clone() for name, p in base.named_parameters()}
    wide = expand_transformer(base, 8)
    mine, theirs = dict(wide.named_parameters()), dict(base.named_parameters())
    own = {n for n in mine if mine[n].data_ptr() != theirs[n].data_ptr()}
    assert own == {"pos_embed.proj.weight", "pos_embed.proj.bias", "proj_out.weight", "proj_out.bias"}
    assert base.config.in_channels == 4
    assert base.pos_embed.proj.weight.shape[1] == 4
    wide.requires_grad_(False)
    assert all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path: Path):
    vae = DetailVAE.from_base(tiny_autoencoder(), np.int64(8), scale=np.int64(2))
    vae.save_pretrained(tmp_path / "vae")
    assert DetailVAE.from_pretrained(tmp_path / "vae").layout == vae.layout
    expand_transformer(tiny_transformer(), np.int64(8)).save_pretrained(tmp_path / "transformer")
    assert SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").config.in_channels == 12


def test_compiled_models_are_upgraded_as_plain_ones():
    base, vae = tiny_transformer(), tiny_autoencoder()
    wide = expand_transformer(torch.compile(base, backend="eager"), 8)
    assert type(wide) is SD3Transformer2DModel
    assert set(wide.state_dict()) == set(base.state_dict())
    assert DetailVAE.from_base(torch.compile(vae, backend="eager"), 8).config["base_class"] == "AutoencoderKL"


@pytest.mark.parametrize("layer", ["proj_out", "pos_embed.proj"])
def test_a_lora_on_a_layer_that_is_widened_is_one_line(layer: str):
    base = tiny_transformer()
    base.add_adapter(LoraConfig(r=2, target_modules=["to_q", layer]))
    with pytest.raises(ValueError, match=rf"^layer {layer} is a peft\S+; unload its LoRA first, after fusing"):
        expand_transformer(base, 8)
    base.unload_lora()
    base.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert expand_transformer(base, 8).config.in_channels == 12


def test_hooks_for_offloading_are_shared_not_copied_with_the_models_that_they_hold():
    other = nn.Linear(2, 2)
    _, before = accelerate.cpu_offload_with_hook(other, "cpu")
    base, _ = accelerate.cpu_offload_with_hook(tiny_transformer(), "cpu", prev_module_hook=before)
    wide = expand_transformer(base, 8)
    assert wide._hf_hook.prev_module_hook.model is other
    assert wide(hidden_states=torch.randn(1, 12, 8, 8), **text_inputs(1, torch.float32)).sample.shape[1] == 12
    assert base(hidden_states=torch.randn(1, 4, 8, 8), **text_inputs(1, torch.float32)).sample.shape[1] == 4


def test_models_offloaded_layer_by_layer_are_refused_and_plans_without_weights_are_not():
    """`enable_sequential_cpu_offload`: between calls no layer has weights to start from."""
    cpu = torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"^layer pos_embed\.proj is offloaded, .* on the meta device; expand before"
    ):
        expand_transformer(accelerate.cpu_offload(tiny_transformer(), cpu, offload_buffers=True), 8)
    with pytest.raises(ValueError, match=r"^this AutoencoderKL is offloaded, .* on the meta device; call from_base"):
        DetailVAE.from_base(accelerate.cpu_offload(tiny_autoencoder(), cpu), 8)
    assert expand_transformer(tiny_transformer().to("meta"), 8).config.out_channels == 12


def test_by_channel_reads_both_token_orders():
    rows = torch.arange(4 * 3)  # p*p = 4 positions, 3 channels
    assert by_channel(rows, 4, 3, "patch_channel")[2, 1] == 2 * 3 + 1
    assert by_channel(rows, 4, 3, "channel_patch")[2, 1] == 1 * 4 + 2


def test_new_weight_masks_mark_exactly_the_added_entries():
    base = tiny_transformer()
    wide = expand_transformer(base, 8)
    masks = new_weight_masks(wide)
    wide_parameters, old = dict(wide.named_parameters()), dict(base.named_parameters())
    assert set(masks) == {"pos_embed.proj.weight", "pos_embed.proj.bias", "proj_out.weight", "proj_out.bias"}
    for name, mask in masks.items():
        assert int((mask == 0).sum()) == old[name].numel()
        assert torch.equal(wide_parameters[name][mask == 0].sort()[0], old[name].flatten().sort()[0])
        assert not wide_parameters[name][mask == 1].any()


def test_lora_trains_exactly_adapters_embedder_and_head():
    wide = expand_transformer(tiny_transformer(), 8)
    choose_trainable(wide, Lora(rank=2))
    trained = {name for name, p in wide.named_parameters() if p.requires_grad}
    whole = {"pos_embed.proj.weight", "pos_embed.proj.bias", "proj_out.weight", "proj_out.bias"}
    adapters = trained - whole
    assert whole < trained
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)
    layers = {name.split(".lora_")[0] for name in adapters}
    expected = {
        f"transformer_blocks.{b}.{layer}"
        for b in (0, 1)
        for layer in (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            *("ff.net.0.proj", "ff.net.2"),
            *(("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2") if b == 0 else ()),
        )
    }
    assert layers == expected
    full = expand_transformer(tiny_transformer(), 8)
    assert len(choose_trainable(full, None)) == len(list(full.parameters()))


def test_random_new_weights_are_those_of_fresh_layers_and_spare_the_pretrained_ones():
    base = tiny_transformer()
    zero, drawn = expand_transformer(base, 8), expand_transformer(base, 8, "random")
    parameters = dict(drawn.named_parameters())
    for name, mask in new_weight_masks(drawn).items():
        weight = parameters[name].detach()
        assert torch.equal(weight * (1 - mask), dict(zero.named_parameters())[name])
        if mask.any():
            fan_in = drawn.pos_embed.proj.weight[0].numel() if name.startswith("pos_embed") else 16
            new = weight[mask.bool()]
            assert new.abs().max() <= fan_in**-0.5
            assert new.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.3)


@pytest.mark.parametrize("lora", [Lora(rank=2), None])
def test_upgrade_file_gives_the_trained_model_and_leaves_the_base_alone(tmp_path: Path, lora: Lora | None):
    base = tiny_transformer()
    before = {name: p.clone() for name, p in base.named_parameters()}
    trained = expand_transformer(tiny_transformer(), 8)
    trained.load_state_dict({**expand_transformer(base, 8).state_dict()})
    for parameter in choose_trainable(trained, lora):
        torch.nn.init.normal_(parameter, std=0.1)
    save_upgrade(trained, tmp_path / "up.safetensors", lora, torch.float32)
    latents, text = torch.randn(1, 12, 8, 8), text_inputs(1, torch.float32)
    expected = trained(hidden_states=latents, **text).sample
    applied = apply_upgrade(base, tmp_path / "up.safetensors")
    torch.testing.assert_close(applied(hidden_states=latents, **text).sample, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert not any("lora" in name for name, _ in applied.named_parameters())
    torch.testing.assert_close(fuse(trained)(hidden_states=latents, **text).sample, expected, rtol=1e-4, atol=1e-4)


def test_one_token_stands_for_many_equal_ones():
    transformer = tiny_transformer().double()
    latents, text = torch.randn(1, 4, 8, 8, dtype=F64), text_inputs(1)
    words = text.pop("encoder_hidden_states")

    def velocity(empty: int) -> torch.Tensor:
        padded = torch.cat([words, words.new_zeros(1, empty, 32)], dim=1)
        return transformer(hidden_states=latents, encoder_hidden_states=padded, **text).sample

    expected = velocity(100)
    processor = repeat_last_token(transformer)
    processor.count = 100
    torch.testing.assert_close(velocity(1), expected, rtol=0, atol=1e-12)
    processor.count = 1
    assert float((velocity(1) - expected).abs().max()) > 1e-3
