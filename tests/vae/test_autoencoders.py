"""Every base autoencoder that a DetailVAE can be built on, and the tiny autoencoders' own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_autoencoder
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    AutoencoderTiny,
    Flux2KleinPipeline,
    QwenImagePipeline,
    SanaPipeline,
)

from davae import DetailVAE
from davae.convert.tiny import convert_tiny
from davae.data.images import ImageDataset
from davae.data.sources import open_source
from davae.errors import ModelError
from davae.evaluate.reconstruction import score_reconstructions
from davae.pretrained.autoencoders import load_autoencoder
from davae.vae.base import (
    AUTOENCODERS,
    autoencoder_family,
    base_channels,
    base_statistics,
    first_convolution,
    image_side,
    spatial_factor,
)
from davae.vae.blocks import downsample
from davae.vae.frames import decode_latents, encode_mode, frames_of
from davae.vae.pooled_tiny import PooledAutoencoderTiny
from davae.vae.warm_start import filter_shares

F64 = torch.float64


def deep_compression(shortcuts: bool = True) -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_out_shortcut=shortcuts,
        decoder_in_shortcut=shortcuts,
        scaling_factor=0.4,
    ).eval()


TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
    "latent_channels": 4,
}
VIDEO = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}


def shaken(model: Any) -> Any:
    """Every weight random: several classes start at ones and zeros."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def packed_batch_norm() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae.eval()


BUILDERS: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": lambda: tiny_autoencoder(quant=False),
    "AutoencoderKL with quant convolutions": lambda: tiny_autoencoder(quant=True),
    "AutoencoderDC": deep_compression,
    "AutoencoderDC without shortcuts": lambda: deep_compression(False),
    "AutoencoderTiny": lambda: AutoencoderTiny(**TINY, scaling_factor=0.5).eval(),
    "AutoencoderKLFlux2": packed_batch_norm,
    "AutoencoderKLQwenImage": lambda: shaken(
        AutoencoderKLQwenImage(**VIDEO, dim_mult=[1, 2, 2], temperal_downsample=[False, True])
    ),
    "AutoencoderKLQwenImage21 with alpha": lambda: shaken(
        AutoencoderKLQwenImage21(
            **VIDEO, decoder_base_dim=8, dim_mult=[1, 2, 2], temperal_downsample=[True, False], scale_factor_spatial=4
        )
    ),
    "AutoencoderKLWan": lambda: shaken(
        AutoencoderKLWan(**VIDEO, dim_mult=[1, 2, 2], temperal_downsample=[False, True])
    ),
    "AutoencoderKLWan in patches, residual": lambda: shaken(
        AutoencoderKLWan(
            **VIDEO,
            dim_mult=[1, 1],
            temperal_downsample=[True],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=4,
        )
    ),
    "PooledAutoencoderTiny": lambda: PooledAutoencoderTiny(**TINY, pooled_blocks=2).eval(),
}


def test_every_supported_class_has_a_case():
    assert {name.split(" ")[0] for name in BUILDERS} == set(AUTOENCODERS)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("upgraded", [False, True])
def test_a_side_is_taken_where_the_reconstruction_has_it(name: str, upgraded: bool):
    model = DetailVAE.from_base(BUILDERS[name](), 4) if upgraded else BUILDERS[name]()
    factor = spatial_factor(model.config, type(model).__name__)
    for side in range(14, 26):
        images = torch.rand(1, 3, side, side) * 2 - 1
        if side % factor == 0:
            assert image_side(model, side) == side
            with torch.no_grad():
                assert decode_latents(model, encode_mode(model, images)).shape == images.shape
            continue
        with pytest.raises(
            ModelError, match=rf"^{side} pixels: .* divisible by {factor}, at least {factor}; use"
        ) as line:
            image_side(model, side)
        nearest = int(str(line.value).split()[-1])
        assert image_side(model, nearest) == nearest
        assert abs(nearest - side) <= factor / 2
    with pytest.raises(ModelError, match="at least 16; use 16"):
        image_side(model, 8, least=15)


def normalised(base: Any, z: torch.Tensor) -> torch.Tensor:
    """Raw latents as stock pipelines hand them to the transformer."""
    if isinstance(base, AutoencoderKLFlux2):
        packed = Flux2KleinPipeline._patchify_latents(z)
        mean, std = base.bn.running_mean, torch.sqrt(base.bn.running_var + base.config.batch_norm_eps)
        return Flux2KleinPipeline._unpatchify_latents((packed - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))
    mean, std = (torch.tensor(values, dtype=F64).view(1, -1, 1, 1) for values in base_statistics(base.config))
    return (z - mean) / std


@pytest.mark.parametrize("name", BUILDERS)
def test_an_unfolded_start_encodes_the_base_latent_of_the_large_picture(name: str):
    base = BUILDERS[name]().to(F64)
    vae = DetailVAE.from_base(base, 2 * base_channels(base.config, type(base).__name__), start="unfolded")
    images = torch.rand(1, 3, 8 * vae.spatial_factor, 8 * vae.spatial_factor, dtype=F64) * 2 - 1
    seen: list[torch.Tensor] = []
    down: Any = vae.detail_encoder.get_submodule(vae._last)
    down.conv.register_forward_hook(lambda module, args, out: seen.append(out))
    shares = filter_shares(vae.layout)
    with torch.no_grad():
        vae.encode_raw(images)
        expected = torch.einsum("kc,bchw->bkhw", shares, encode_mode(base, images))
    torch.testing.assert_close(seen[0][:, : len(shares)], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_detail_vae_on_any_base(name: str, scale: int, tmp_path: Path):
    base = BUILDERS[name]().to(F64)
    vae = DetailVAE.from_base(base, 8, scale)
    factor = spatial_factor(base.config, type(base).__name__)
    assert vae.spatial_factor == scale * factor
    images = torch.rand(2, 3, 8 * vae.spatial_factor, 8 * vae.spatial_factor, dtype=F64) * 2 - 1

    # z is the base's own latent of the small picture, normalised as pipelines do it
    with torch.no_grad():
        expected = normalised(base, encode_mode(base, downsample(images, scale)))
        latents = vae.encode(images).latent_dist.mode()
    z, z_d = vae.layout.split(latents)
    assert float((z - expected).abs().max()) < 1e-12
    assert z_d.shape[1] == 8

    # the decoder starts as the base's: its first layer on [z, 0] is the base's first layer on z enlarged, inside the border
    weight, bias = first_convolution(base, autoencoder_family(type(base).__name__))
    raw = vae.denormalise(vae.layout.join(z, torch.zeros_like(z_d)))
    raw_z, _ = vae.layout.split(raw)
    up = vae.decoder.get_submodule(vae._first)
    with torch.no_grad():
        started = up(vae.layout.join(raw_z, torch.zeros_like(z_d)))
        wanted = F.conv2d(F.interpolate(raw_z, scale_factor=scale), weight, bias, padding=1)
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    assert float((started - wanted)[inside].abs().max()) < 1e-10

    # the folded weights are what the base decoder does first
    with torch.no_grad():
        decoded = vae.decode(latents).sample
    assert decoded.shape == images.shape
    trained = {n.split(".")[0] for n, p in vae.named_parameters() if p.requires_grad}
    assert trained == {"detail_encoder", "decoder"}
    decoded = vae.decode(latents).sample
    gradients = torch.autograd.grad(decoded.sum(), [vae.last_decoder_weight])
    assert float(gradients[0].abs().max()) > 0

    vae.save_pretrained(tmp_path)
    again = DetailVAE.from_pretrained(tmp_path, torch_dtype=F64)
    with torch.no_grad():
        assert float((again.decode(latents).sample - decoded).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "name",
    ["AutoencoderDC", "AutoencoderKL with quant convolutions", "AutoencoderKLFlux2", "AutoencoderKLQwenImage"],
)
def test_the_folded_first_convolution_is_the_base_decoder_s(name: str):
    base = BUILDERS[name]().to(F64)
    weight, bias = first_convolution(base, autoencoder_family(type(base).__name__))
    z = torch.randn(1, 4, 6, 6, dtype=F64)
    seen: list[torch.Tensor] = []
    if name == "AutoencoderDC":  # the shortcut is added outside of the convolution: look at what the first block gets
        base.decoder.up_blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    else:
        base.decoder.conv_in.register_forward_hook(
            lambda module, inputs, output: seen.append(output[:, :, 0] if output.ndim == 5 else output)
        )
    with torch.no_grad():
        decode_latents(base, z)
        mine = F.conv2d(z, weight, bias, padding=1)
    inside = (..., slice(1, -1), slice(1, -1))  # a post-quant bias meets the zero padding at the border
    assert float((mine - seen[0])[inside].abs().max()) < 1e-12


def test_sana_s_pipeline_gets_the_doubled_factor():
    vae = DetailVAE.from_base(deep_compression(), 8)
    pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=None, scheduler=None)  # type: ignore[arg-type]
    assert pipeline.vae_scale_factor == vae.spatial_factor == 8
    assert vae.config.scaling_factor == 1.0


def test_flux2_s_pipeline_finds_an_identity_batch_norm_of_all_channels(tmp_path: Path):
    base = packed_batch_norm()
    vae = DetailVAE.from_base(base, 8)
    vae.save_pretrained(tmp_path)
    vae = DetailVAE.from_pretrained(tmp_path)
    assert vae.bn.running_mean.shape == (4 * 12,)
    for epsilon in (vae.config.batch_norm_eps, 1e-5):  # Ernie-Image's pipeline writes its own
        assert torch.allclose(torch.sqrt(vae.bn.running_var + epsilon), torch.ones(48), rtol=1e-6, atol=0)
    assert torch.equal(vae.bn.running_mean, torch.zeros(48))
    # an odd grid starts at the first position of a cell
    odd = torch.randn(1, 12, 3, 5)
    even = torch.nn.functional.pad(odd, (0, 1, 0, 1))
    assert torch.equal(vae.normalise(odd), vae.normalise(even)[..., :3, :5])


def test_a_video_autoencoder_s_pipeline_hands_over_one_frame():
    vae = DetailVAE.from_base(BUILDERS["AutoencoderKLQwenImage"](), 8, 4)
    pipeline = QwenImagePipeline(scheduler=None, vae=vae, text_encoder=None, tokenizer=None, transformer=None)  # type: ignore[arg-type]
    assert pipeline.vae_scale_factor == vae.spatial_factor == 16
    assert (vae.config.z_dim, vae.config.latents_mean, vae.config.latents_std) == (12, [0.0] * 12, [1.0] * 12)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        framed = vae.encode(images[:, :, None]).latent_dist.mode()
        assert torch.equal(framed, latents[:, :, None])
        assert torch.equal(vae.decode(framed).sample, vae.decode(latents).sample[:, :, None])
    with pytest.raises(ValueError, match="found 2 frames; a DetailVAE takes images"):
        vae.decode(framed.repeat(1, 1, 2, 1, 1))


def test_a_frame_is_decoded_as_the_base_decodes_it():
    for name in ("AutoencoderKLQwenImage21 with alpha", "AutoencoderKLWan in patches, residual"):
        base = BUILDERS[name]().to(F64)
        z = torch.randn(1, 4, 4, 4, dtype=F64)
        frames = frames_of(type(base).__name__, base.config)
        with torch.no_grad():
            mine = frames.decode(base.decoder, base.post_quant_conv(z[:, :, None])[:, :, 0])
            assert torch.equal(mine.clamp(-1, 1), decode_latents(base, z))


def test_tiny_autoencoders_refuse_checkpointing_that_would_change_them():
    vae = DetailVAE.from_base(BUILDERS["AutoencoderTiny"](), 8)
    with pytest.raises(ValueError, match="has no gradient checkpointing, or computes something else"):
        vae.enable_gradient_checkpointing()


def test_an_unknown_autoencoder_names_the_nearest_ones():
    with pytest.raises(ValueError, match=r"AutoencoderKLX is not supported; the nearest that are: AutoencoderKL"):
        autoencoder_family("AutoencoderKLX")


@pytest.fixture(scope="module")
def taef2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [shared / "weights/taef2" / f"taef2_{part}.pth" for part in ("encoder", "decoder")]
    return convert_tiny(*files, tmp_path_factory.mktemp("taef2") / "vae")


def photos(shared: Path, count: int) -> torch.Tensor:
    source = open_source(str(shared / "data/clothing128.tar"), 128)
    pictures = ImageDataset(source, list(range(count)), 128)
    return torch.stack([pictures[(i, -1)]["image"] for i in range(count)])


def test_taef2_s_real_weights_reconstruct_photos(taef2: Path, shared: Path):
    model = load_autoencoder(str(taef2))
    assert type(model) is PooledAutoencoderTiny
    assert model.config.latent_channels == 32

    @torch.no_grad()
    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return model.decode(encode_mode(model, images)).sample

    scores = score_reconstructions([photos(shared, 8)], reconstruct)
    assert scores.psnr > 28  # a wrong pooled block gives 20 and less


def test_tiny_files_that_do_not_fit_are_refused_by_key(taef2: Path, shared: Path, tmp_path: Path):
    encoder = torch.load(shared / "weights/taef2/taef2_encoder.pth", weights_only=True)
    del encoder["3.conv.2.bias"]
    torch.save(encoder, tmp_path / "short.pth")
    with pytest.raises(ModelError, match=r"missing encoder\.layers\.3\.conv\.2\.bias"):
        convert_tiny(tmp_path / "short.pth", shared / "weights/taef2/taef2_decoder.pth", tmp_path / "out")


def decibels(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """PSNR over the range of what is wanted."""
    span = float(wanted.max() - wanted.min())
    return float(20 * torch.log10(span / (found - wanted).square().mean().sqrt()))


@pytest.mark.parametrize("name", BUILDERS)
def test_tiles_give_the_whole_result(name: str):
    """Layers that see the whole image see it also in tiles: pooled blocks, linear attention, attention, group norms."""
    vae = DetailVAE.from_base(BUILDERS[name](), 8)
    images = F.interpolate(torch.rand(1, 3, 12, 12) * 2 - 1, (192, 160), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        whole = vae.decode(latents).sample
        vae.enable_tiling(64, 0.25)
        assert decibels(vae.encode(images).latent_dist.mode(), latents) > 45
        assert decibels(vae.decode(latents).sample, whole) > 45


@pytest.mark.slow
def test_taef2_s_real_weights_in_tiles(taef2: Path, shared: Path):
    """By davae's own tiles as base, and inside a DetailVAE."""
    base = load_autoencoder(str(taef2))
    images = torch.cat([torch.cat([*photos(shared, 4)[:2]], 2), torch.cat([*photos(shared, 4)[2:]], 2)], 1)[
        None
    ]  # (1,3,256,256)
    detail = DetailVAE.from_base(base, 32)
    with torch.no_grad():
        latents = base.encode(images).latents
        whole = base.decode(latents).sample
        base.enable_tiling()
        base.tile_latent_min_size, base.tile_sample_min_size = 16, 128
        assert decibels(base.encode(images).latents, latents) > 45
        assert decibels(base.decode(latents).sample, whole) > 45
        latents = detail.encode(images).latent_dist.mode()
        whole = detail.decode(latents).sample
        detail.enable_tiling(128, 0.25)
        assert decibels(detail.encode(images).latent_dist.mode(), latents) > 45
        assert decibels(detail.decode(latents).sample, whole) > 45
