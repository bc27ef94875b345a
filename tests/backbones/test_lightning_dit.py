"""LightningDiT: equality with the official outputs, with diffusers' DiT, and with itself after an upgrade; its sampler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from davae import ClassConditionalPipeline, DetailVAE, LatentLayout, LightningDiT, expand_transformer
from davae.backbones.lightning_layers import RotaryEmbedding, grid_positions, rotary_angles
from davae.backbones.repatch import change_patch
from davae.backbones.trainable import choose_trainable
from davae.convert.lightningdit import dit, lightningdit
from davae.device import compile_blocks
from davae.losses.velocity import detail_direction_loss, direction_loss
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import apply_upgrade, save_upgrade
from davae.recipes.sections import Lora
from davae.sample import euler_ode
from davae.sample.ode import SOLVERS, solve_ode, time_grid

FIXTURE = "fixtures/lightningdit_a.safetensors"
CONFIGS = {
    "lightning": {"use_qknorm": True},
    "p2": {"patch_size": 2},
    "plain": {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False},
    "layernorm-qk": {"use_qknorm": True, "use_rmsnorm": False, "num_heads": 4},
    "without-shift": {"wo_shift": True},
    "variance": {"learn_sigma": True, "patch_size": 2},
}


def random_model(dtype: torch.dtype = torch.float64, **changes: object) -> LightningDiT:
    """A tiny model in which every path matters: the class starts its gates and head at zero."""
    sizes = {"input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = LightningDiT(**{**sizes, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def inputs(batch: int = 3, channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, channels, 8, 8, dtype=dtype), torch.rand(batch), torch.randint(0, 6, (batch,))


@pytest.fixture(scope="module")
def official(shared: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(shared / FIXTURE, framework="pt") as stream:
        return stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def test_official_velocity_and_samples(official) -> None:
    metadata, tensors = official
    model = lightningdit(weights(tensors), **json.loads(metadata["config"]))
    with torch.no_grad():
        velocity = model(tensors["io.x"], tensors["io.t"], tensors["io.y"]).sample
    torch.testing.assert_close(velocity, tensors["io.velocity"], atol=1e-5, rtol=0)
    sampler = {name: value for name, value in json.loads(metadata["sampler"]).items() if name != "method"}
    guided = euler_ode(model, tensors["sample.z"], tensors["sample.y"], **sampler)
    torch.testing.assert_close(guided, tensors["sample.cfg"], atol=1e-5, rtol=0)
    plain = {name: sampler[name] for name in ("num_steps", "timestep_shift")}
    unguided = euler_ode(model, tensors["sample.z"], tensors["sample.y"], **plain)
    torch.testing.assert_close(unguided, tensors["sample.no_cfg"], atol=1e-5, rtol=0)


def test_xl_has_the_official_size_and_names(official) -> None:
    _, tensors = official
    with torch.device("meta"):
        model = LightningDiT()
    assert sum(parameter.numel() for parameter in model.parameters()) == 675_256_736
    of_one_block = {re.sub(r"blocks\.\d+\.", "blocks.N.", name) for name in weights(tensors)}
    without_qk = {name for name in of_one_block if "_norm.weight" not in name or "attn" not in name}
    assert {re.sub(r"blocks\.\d+\.", "blocks.N.", name) for name in model.state_dict()} == without_qk
    assert len(model.blocks) == 28


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_pairs_turn_by_their_angle(dtype: torch.dtype) -> None:
    positions = grid_positions(3, 4)
    angles = rotary_angles(positions, 8)  # (9,8), each angle twice
    x = torch.randn(2, 9, 4, 8, dtype=torch.float64).transpose(1, 2)  # (B,H,L,d), not contiguous
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles[:, ::2].cos(), angles[:, ::2].sin()
    expected = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    found = RotaryEmbedding(positions, 8)(x.to(dtype))
    assert found.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_expanded_model_is_the_pretrained_one_at_step_0(name: str) -> None:
    base = random_model(**CONFIGS[name])
    expanded = expand_transformer(base, 12)
    layout = LatentLayout(4, 12)
    z, t, y = inputs()
    z_d = torch.randn(3, 12, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        velocity, velocity_d = layout.split(expanded(layout.join(z, z_d), t, y).sample)
        torch.testing.assert_close(velocity, base(z, t, y).sample, atol=1e-12, rtol=0)
    assert not velocity_d.any()


def test_paper_channels_expand_exactly(tmp_path: Path) -> None:
    """C = 32, D = 96, p = 1 on 16x16 tokens, through a folder."""
    base = random_model(in_channels=32, input_size=16, use_qknorm=True)
    expand_transformer(base, 96).save_pretrained(tmp_path)
    expanded = LightningDiT.from_pretrained(tmp_path, torch_dtype=torch.float64)
    x = torch.randn(2, 128, 16, 16, dtype=torch.float64)
    t, y = torch.tensor([0.3, 0.9]), torch.tensor([1, 5])
    with torch.no_grad():
        velocity = expanded(x, t, y).sample
        torch.testing.assert_close(velocity[:, :32], base(x[:, :32], t, y).sample, atol=1e-12, rtol=0)
    assert not velocity[:, 32:].any()


def test_equals_diffusers_dit_but_for_its_frequencies() -> None:
    """DiT's architecture against diffusers' own, weights mapped; diffusers spaces frequencies by i/127, DiT by i/128."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.double()
    source = theirs.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    for name in list(source):  # one embedder for all blocks, as in DiT
        if ".norm1.emb." in name:
            source[name] = source[first + name.split(".norm1.emb.")[1]]
    theirs.load_state_dict(source)
    own = {
        "x_embedder.proj.weight": source["pos_embed.proj.weight"],
        "x_embedder.proj.bias": source["pos_embed.proj.bias"],
        "pos_embed": theirs.pos_embed.pos_embed,
        "y_embedder.embedding_table.weight": source[first + "class_embedder.embedding_table.weight"],
        **{
            f"t_embedder.mlp.{2 * n}.{part}": source[f"{first}timestep_embedder.linear_{n + 1}.{part}"]
            for n in range(2)
            for part in ("weight", "bias")
        },
    }
    for part in ("weight", "bias"):
        own[f"final_layer.adaLN_modulation.1.{part}"] = source[f"proj_out_1.{part}"]
        own[f"final_layer.linear.{part}"] = source[f"proj_out_2.{part}"]
        for n in range(2):
            block = f"transformer_blocks.{n}."
            qkv = [source[f"{block}attn1.to_{letter}.{part}"] for letter in "qkv"]
            own |= {
                f"blocks.{n}.attn.qkv.{part}": torch.cat(qkv),
                f"blocks.{n}.attn.proj.{part}": source[f"{block}attn1.to_out.0.{part}"],
                f"blocks.{n}.mlp.fc1.{part}": source[f"{block}ff.net.0.proj.{part}"],
                f"blocks.{n}.mlp.fc2.{part}": source[f"{block}ff.net.2.{part}"],
                f"blocks.{n}.adaLN_modulation.1.{part}": source[f"{block}norm1.linear.{part}"],
            }
    ours = dit(own, num_heads=2).double()
    x, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 5])
    t = torch.tensor([0, 500, 999])
    with torch.no_grad():
        stock = theirs(x, t, class_labels=y).sample
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        found, equal = ours(x, t, y).sample, theirs(x, t, class_labels=y).sample
    torch.testing.assert_close(found, equal, atol=1e-5, rtol=1e-5)
    assert torch.allclose(theirs.pos_embed.pos_embed, LightningDiT(8, 2, 4, 32, 1, 2).pos_embed.double(), atol=1e-6)
    assert (found - stock).abs().max() > 1e-2


def test_time_and_velocity_turn_round() -> None:
    model, turned = random_model(), random_model(reversed_time=True)
    turned.load_state_dict(model.state_dict())
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(turned(x, 1 - t, y).sample, -model(x, t, y).sample)


def test_other_grid_spans_the_same_range() -> None:
    model = random_model()
    x, t, y = inputs()
    with torch.no_grad():
        plain = model(x, t, y).sample
        with model.at_grid(8):
            assert torch.equal(model(x, t, y).sample, plain)
        with model.at_grid(16), pytest.raises(ValueError, match=r"takes \(4, 16, 16\)"):
            model(x, t, y)
        # every second position of the finer grid is a position of the pretrained one
        with model.at_grid(16):
            assert model._tables is not None
            fine = model._tables.embedding.unflatten(1, (16, 16))[:, ::2, ::2].flatten(1, 2)
        torch.testing.assert_close(fine, model.pos_embed.detach())
        assert torch.equal(model(x, t, y).sample, plain)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = random_model()
    x, t, y = inputs()
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(x, t, y).sample.square().mean().backward()
        found.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_compiles_without_a_graph_break() -> None:
    model = random_model(use_qknorm=True)
    x, t, y = inputs()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, y).sample, model(x, t, y).sample)


def test_compiled_blocks_in_mixed_precision_have_the_gradients_of_eager_ones() -> None:
    """torch 2.14's AVX-512 code gave NaN here, where rotary positions meet autocast."""
    torch.manual_seed(0)
    model = random_model(torch.float32, hidden_size=192, num_heads=6, depth=1, use_qknorm=True)
    x, t, y = inputs(dtype=torch.float32)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sample = model(x, t, y).sample
        sample.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    eager = gradient()
    compile_blocks(model, torch.device("cpu"))
    assert (gradient() - eager).norm() < 0.02 * eager.norm()


def test_lora_trains_adapters_and_both_ends(tmp_path: Path) -> None:
    base = random_model(torch.float32)
    expanded = expand_transformer(base, 8)
    trained = choose_trainable(expanded, Lora(rank=2))
    names = {n for n, p in expanded.named_parameters() if p.requires_grad}
    assert len(trained) == len(names)
    ends = {f"{path}.{part}" for path in ("x_embedder.proj", "final_layer.linear") for part in ("weight", "bias")}
    targets = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
    adapters = {
        f"blocks.{n}.{target}.lora_{side}.default.weight" for n in range(2) for target in targets for side in "AB"
    }
    assert names == ends | adapters
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = inputs(channels=12, dtype=torch.float32)
    with torch.no_grad():
        expected = expanded(x, t, y).sample
    save_upgrade(expanded, tmp_path / "upgrade.safetensors", Lora(rank=2), torch.float32)
    with torch.no_grad():
        found = apply_upgrade(base, tmp_path / "upgrade.safetensors")(x, t, y).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Counting(torch.nn.Module):
    """Counts the pictures that pass the network."""

    def __init__(self, model: LightningDiT):
        super().__init__()
        self.model, self.config, self.pictures = model, model.config, 0

    def forward(self, x: torch.Tensor, *rest: object, **options: object) -> object:
        self.pictures += len(x)
        return self.model(x, *rest, **options)


@pytest.mark.parametrize("channels", [None, 3])
def test_unconditional_half_only_inside_the_interval(channels: int | None) -> None:
    """250 grid points, shift 0.3, guided from 0.2: as few evaluations as the interval needs, the result of the whole."""
    model = Counting(random_model(torch.float32))
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 4])
    found = euler_ode(model, noise, y, 250, 4.0, 0.2, 0.3, channels)
    times = time_grid(250, 0.3)
    guided = int((times[:-1] >= 0.2).sum())
    assert 0 < guided < 249
    assert model.pictures == 2 * (249 + guided)

    x, null = noise, torch.full_like(y, 5)
    with torch.no_grad():  # both halves everywhere
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            time = torch.full((2,), t)
            v, v_null = model(x, time, y).sample, model(x, time, null).sample
            mixed = v_null + 4.0 * (v - v_null) if t >= 0.2 else v
            if channels is not None:
                mixed = torch.cat([mixed[:, :channels], v[:, channels:]], dim=1)
            x = x + (t_next - t) * mixed
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_no_guidance_costs_one_evaluation_a_step() -> None:
    model = Counting(random_model(torch.float32))
    euler_ode(model, torch.randn(2, 4, 8, 8), torch.tensor([1, 4]), 11)
    assert model.pictures == 20


def test_solvers_have_their_order() -> None:
    """dx/dt = x from 1 over [0,1] ends at e: halving the step halves Euler's error and quarters Heun's."""
    one = torch.ones(1, dtype=torch.float64)
    errors = {
        name: [abs(float(solver(lambda x, t: x, one, time_grid(n + 1, 1.0).double())) - torch.e) for n in (50, 100)]
        for name, solver in SOLVERS.items()
    }
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.05)
    assert errors["heun"][0] / errors["heun"][1] == pytest.approx(4, rel=0.05)


def test_small_steps_are_not_lost_in_half_precision() -> None:
    """250 steps of a constant velocity of 1/2 from 1 end at 1.5; each is less than bfloat16 adds to 1."""

    class Constant:
        config: ClassVar = {"prediction_type": "velocity", "num_classes": 2}

        def __call__(self, x: Tensor, *given: Any, **options: Any) -> tuple[Tensor]:
            assert x.dtype == torch.bfloat16
            return (torch.full_like(x, 0.5),)

    noise = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    latents = solve_ode(Constant(), noise, torch.tensor([0]), 250)
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents, torch.full_like(latents, 1.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": torch.tensor([5])}, "class label 5 is out of range: the model has classes 0 to 4"),
        ({"class_labels": torch.tensor([-1])}, "class label -1 is out of range"),
        ({"num_steps": 1}, "at least 2, found 1"),
        ({"timestep_shift": 0.0}, "must be positive"),
        ({"solver": "magic"}, "use one of euler, heun"),
        ({"noise": torch.randn(1, 4, 6, 6)}, r"latents are \(4, 6, 6\), this LightningDiT takes \(4, 8, 8\)"),
    ],
)
def test_bad_sampling_is_refused(arguments: dict, message: str) -> None:
    defaults = {"noise": torch.randn(1, 4, 8, 8), "class_labels": torch.tensor([0]), "num_steps": 3}
    with pytest.raises(ValueError, match=message):
        solve_ode(random_model(torch.float32), **{**defaults, **arguments})


def test_another_patch_size_starts_as_the_mean() -> None:
    """On latents that are constant within each new patch, p=2 gives what p=1 gives on the coarse grid."""
    base = random_model()
    wide = change_patch(base, 2, 16).double()
    coarse, t, y = inputs()
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        expected = base(coarse, t, y).sample.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(wide(fine, t, y).sample, expected)
    with pytest.raises(ValueError, match="patch_size 3 is not a multiple"):
        change_patch(wide, 3, 12)


def test_direction_loss() -> None:
    x = torch.randn(2, 8, 3, 3)
    assert float(direction_loss(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert float(direction_loss(x, -x)) == pytest.approx(2, abs=1e-6)
    layout, target = LatentLayout(4, 4), torch.randn(2, 8, 3, 3)
    assert detail_direction_loss(x, target, layout, 1.0) == direction_loss(x, target)
    base = direction_loss(layout.split(x)[0], layout.split(target)[0])
    torch.testing.assert_close(detail_direction_loss(x, target, layout, 0.0), base)


def small_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
        scaling_factor=1.0,
    ).eval()


def test_pipeline_saves_loads_and_draws(tmp_path: Path) -> None:
    names = ["cat", "tabby cat", "dog", "bird", "fish"]
    pipeline = ClassConditionalPipeline(small_autoencoder(), random_model(torch.float32), class_names=names)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert type(again) is ClassConditionalPipeline
    assert again.class_names == names

    def draw(pipe: ClassConditionalPipeline, prompt: object, **options: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt, num_inference_steps=4, generator=generator, output_type="pt", **options).images

    first = draw(pipeline, ["dog", 3])
    assert first.shape == (2, 3, 16, 16)
    assert torch.equal(first, draw(again, ["2", "bird"]))
    assert not torch.equal(first, draw(again, ["cat", "fish"]))
    assert draw(again, "bird", height=32, num_images_per_prompt=2).shape == (2, 3, 32, 32)
    for numbers in ((2, 3), [np.int64(2), "bird"], np.array([2, 3]), torch.tensor([2, 3]), range(2, 4)):
        assert torch.equal(draw(again, numbers), first)
    assert torch.equal(draw(again, torch.tensor(2)), draw(again, "dog"))
    # what it draws is the ODE's end, denormalised by the autoencoder's statistics
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x = euler_ode(pipeline.transformer, noise, torch.tensor([0]), 5, cfg_scale=4.0)
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{part}"]).view(1, 4, 1, 1) for part in ("mean", "std"))
    with torch.no_grad():
        expected = pipeline.vae.decode(x * std + mean).sample
    torch.testing.assert_close(draw(pipeline, "cat"), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)

    for prompt, message in (
        ("horse", "'horse' is not a class of this model; its classes are cat, tabby cat, dog"),
        ("i", "'i' fits 2 classes"),
        (5, "class label 5 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipeline, prompt)
    with pytest.raises(ValueError, match="squares whose side is divisible by 2"):
        draw(pipeline, "cat", height=33)


@pytest.mark.parametrize("upgraded", [False, True])
def test_from_pipe_takes_every_autoencoder_over(upgraded: bool) -> None:
    """diffusers compares the class of each part with the annotations of `__init__`, where an autoencoder is `Any`."""
    vae = DetailVAE.from_base(small_autoencoder(), 4) if upgraded else small_autoencoder()
    pipeline = ClassConditionalPipeline(vae, random_model(torch.float32), class_names=["cat"], timestep_shift=0.5)
    again = ClassConditionalPipeline.from_pipe(pipeline)
    assert (again.vae, again.transformer) == (vae, pipeline.transformer)
    assert (again.class_names, again.config["timestep_shift"]) == (["cat"], 0.5)
    other = small_autoencoder()
    assert ClassConditionalPipeline.from_pipe(pipeline, vae=other).vae is other


def test_epsilon_model_runs_under_its_scheduler() -> None:
    """One DDPM step of a DiT with learned variance, against the scheduler called by hand."""
    model = random_model(torch.float32, learn_sigma=True, prediction_type="epsilon")
    assert model.config["out_channels"] == 8
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipeline = ClassConditionalPipeline(small_autoencoder(), model, scheduler, cfg_channels=3)
    noise = torch.randn(1, 4, 8, 8)
    options = {"num_inference_steps": 1, "latents": noise, "output_type": "latent", "guidance_scale": 2.0}
    found = pipeline(1, generator=torch.Generator().manual_seed(0), **options).images
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        output = model(noise.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([1, 5])).sample
    cond, null = output[:1].clone(), output[1:]
    cond[:, :3] = null[:, :3] + 2.0 * (cond[:, :3] - null[:, :3])
    expected = scheduler.step(cond, t, noise, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="needs a scheduler"):
        ClassConditionalPipeline(small_autoencoder(), model)(1, num_inference_steps=1)
