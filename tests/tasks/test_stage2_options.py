"""Stage 2: further layers for LoRA, and models into which guidance was distilled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from conftest import tiny_transformer
from safetensors import safe_open
from test_lightning_dit import random_model

from davae import LatentLayout, expand_transformer
from davae.backbones.trainable import choose_trainable
from davae.errors import RecipeError
from davae.latent import LatentStatistics
from davae.losses.flow_matching import FlowMatching
from davae.publish.assemble import apply_upgrade, save_upgrade, trained_transformer, without_lora
from davae.recipes.sections import Lora, Stage2
from davae.tasks.conditioning import conditioning
from davae.tasks.solving import guided, solve
from davae.tasks.stage2 import Stage2Task
from davae.train.random import SampleRandom


def adapted(lora: Lora) -> set[str]:
    transformer = expand_transformer(tiny_transformer(), 4)
    choose_trainable(transformer, lora)
    return {
        name.partition(".lora_A")[0]
        for name, parameter in transformer.named_parameters()
        if ".lora_A" in name and parameter.requires_grad
    }


def test_lora_adapts_further_layers_by_the_end_of_their_names():
    few, more = adapted(Lora(rank=2)), adapted(Lora(rank=2, extra_targets=("norm1.linear",)))
    assert more - few == {f"transformer_blocks.{block}.norm1.linear" for block in range(2)}
    assert few < more
    for wrong in ("norm1", "no.such.layer", "orm1.linear", "norm1.*"):  # a whole name, no part of one, no pattern
        with pytest.raises(
            RecipeError, match=r"stage2\.lora\.extra_targets: no layer of SD3Transformer2DModel has a name"
        ):
            adapted(Lora(rank=2, extra_targets=(wrong,)))


@pytest.mark.parametrize(
    ("targets", "norms"), [((), False), (("norm1.linear", "norm1_context.linear"), False), ((), True)]
)
def test_an_upgrade_file_keeps_further_layers(tmp_path: Path, targets: tuple[str, ...], norms: bool):
    base, lora = tiny_transformer(), Lora(rank=2, extra_targets=targets, train_norms=norms)
    trained = expand_transformer(base, 4)
    choose_trainable(trained, lora)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_upgrade(trained, tmp_path / "upgrade.safetensors", lora, torch.float32)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 8, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500.0]),
    }
    applied = apply_upgrade(base, tmp_path / "upgrade.safetensors")
    torch.testing.assert_close(applied(**inputs).sample, trained(**inputs).sample, rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "upgrade.safetensors", "pt") as stream:
        assert ("extra_targets" in stream.metadata()["lora"]) == bool(targets), "earlier versions read the usual ones"
        assert ("train_norms" in stream.metadata()["lora"]) == norms
    if norms:  # LoRA apart: norms stay in the model
        pipeline = trained_transformer(base, tmp_path / "upgrade.safetensors")
        alone = without_lora(pipeline).state_dict()
        for name, value in trained.named_parameters():
            if "norm" in name and value.requires_grad:
                assert torch.equal(alone[name], value)


NORMS = {
    "SD3Transformer2DModel": """
        norm_out.linear.weight norm_out.linear.bias
        transformer_blocks.N.norm1.linear.weight transformer_blocks.N.norm1.linear.bias
        transformer_blocks.N.norm1_context.linear.weight transformer_blocks.N.norm1_context.linear.bias
        transformer_blocks.N.attn.norm_q.weight transformer_blocks.N.attn.norm_k.weight
        transformer_blocks.N.attn.norm_added_q.weight transformer_blocks.N.attn.norm_added_k.weight
    """,
    "LightningDiT": """
        final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias final_layer.norm_final.weight
        blocks.N.adaLN_modulation.1.weight blocks.N.adaLN_modulation.1.bias
        blocks.N.norm1.weight blocks.N.norm2.weight blocks.N.attn.q_norm.weight blocks.N.attn.k_norm.weight
    """,
    "PixArtTransformer2DModel": """
        scale_shift_table transformer_blocks.N.scale_shift_table adaln_single.linear.weight adaln_single.linear.bias
    """,
    "DiTTransformer2DModel": """
        transformer_blocks.N.norm1.linear.weight transformer_blocks.N.norm1.linear.bias
        proj_out_1.weight proj_out_1.bias
    """,
}


def with_norms(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tiny model of a class, and its upgrade."""
    if name == "SD3Transformer2DModel":
        model: torch.nn.Module = tiny_transformer()
    elif name == "LightningDiT":
        model = random_model(torch.float32, use_qknorm=True)
    else:
        model = CASES[name].build(name)
    return model, expand_transformer(model, 4)


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_modulation_are_trained_in_full_next_to_lora(name: str):
    model, transformer = with_norms(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def trained(lora: Lora) -> set[str]:
        upgraded = with_norms(name)[1]
        choose_trainable(upgraded, lora)
        return {key for key, parameter in upgraded.named_parameters() if parameter.requires_grad}

    plain, more = trained(Lora(rank=2)), trained(Lora(rank=2, train_norms=True))
    assert plain < more
    assert {re.sub(r"(blocks)\.\d+\.", r"\1.N.", key) for key in more - plain} == set(NORMS[name].split())
    for parameter in choose_trainable(transformer, Lora(rank=2, train_norms=True)):
        parameter.data += 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the base keeps its own"


def test_a_layer_is_adapted_or_trained_in_full():
    lora = Lora(rank=2, extra_targets=("norm1.linear",), train_norms=True)
    with pytest.raises(
        RecipeError, match=r"extra_targets: 'norm1.linear' adapts transformer_blocks.0.norm1.linear, which"
    ):
        adapted(lora)


class StepRecorder(torch.nn.Module):
    """A FLUX that notes what it is called with."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels, self.calls = channels, []

    def forward(self, hidden_states: torch.Tensor, guidance: Any, **_: Any) -> tuple[torch.Tensor]:
        self.calls.append(guidance)
        return (torch.zeros(*hidden_states.shape[:2], self.channels * 4),)


class Captions:
    """What the cache answers, and which captions it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed(self, captions: list[str]) -> tuple[torch.Tensor, ...]:
        self.asked += captions
        return torch.zeros(len(captions), 3, 8), torch.zeros(len(captions), 8)


def flux_task(distilled: bool, **settings: Any) -> tuple[Stage2Task, StepRecorder, Captions]:
    flux = CASES["FluxTransformer2DModel"].build("FluxTransformer2DModel", guidance_embeds=distilled)
    cache, stage = Captions(), Stage2(max_steps=1, batch_size=8, lora=Lora(rank=2), caption_dropout=0.5, **settings)
    transformer, device = expand_transformer(flux, 4), torch.device("cpu")
    condition = conditioning(transformer, cache, device, guidance=stage.embedded_guidance)  # type: ignore[arg-type]
    layout, ones = LatentLayout(4, 4), torch.ones(1, 8, 1, 1)
    statistics = LatentStatistics(0 * ones, ones)
    given: Any = cache
    task = Stage2Task(stage, layout, transformer, given, statistics, condition, FlowMatching(), device)
    task.modules["transformer"] = StepRecorder(8)
    return task, task.modules["transformer"], cache


def train_once(task: Stage2Task) -> None:
    batch = {"latents": torch.randn(8, 8, 4, 4), "conditions": ["a"] * 8}
    task.loss("transformer", batch, 0, SampleRandom(0, "stage2", 0, 0, 8))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_guidance_distilled_model_trains_at_guidance_one_on_all_captions(guidance: float):
    task, model, cache = flux_task(True, **({} if guidance == 1 else {"embedded_guidance": guidance}))
    train_once(task)
    assert torch.equal(model.calls[0], torch.full((8,), guidance))
    assert cache.asked == ["a"] * 8, "it is never called with an empty caption"


def test_a_model_that_is_guided_by_two_passes_still_drops_captions():
    task, model, cache = flux_task(False)
    train_once(task)
    assert model.calls == [None]
    assert set(cache.asked) == {"a", ""}


@pytest.mark.parametrize("distilled", [True, False])
def test_pictures_of_progress_are_guided_once(distilled: bool):
    task, model, cache = flux_task(distilled)
    conditioning, scale = guided(task.conditioning, 3.5)
    solve(conditioning, task, torch.randn(2, 8, 4, 4), ["a", "b"], steps=3, guidance_scale=scale)
    if distilled:
        assert [float(guidance[0]) for guidance in model.calls] == [3.5] * 3
        assert "" not in cache.asked
        train_once(task)
        assert float(model.calls[-1][0]) == 1.0, "training goes on at its own"
    else:
        assert len(model.calls) == 6, "two passes a step"


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_pictures_of_progress_are_not_guided_at_scales_that_turn_a_pipeline_s_guidance_off(scale: float):
    task, model, cache = flux_task(False)
    conditioning, scale = guided(task.conditioning, scale)
    solve(conditioning, task, torch.randn(2, 8, 4, 4), ["a", "b"], steps=3, guidance_scale=scale)
    assert len(model.calls) == 3, "one pass a step"
    assert "" not in cache.asked
