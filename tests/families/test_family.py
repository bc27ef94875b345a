"""A family defined here: one Family object and one entry of the registry are all that the library needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from davae.backbones.call import Call, Parts, SizedCall
from davae.backbones.expand import expand_transformer, latent_channels, new_weight_masks
from davae.backbones.families import FAMILIES, component_in, denoiser, family_by_class, family_of, supported
from davae.backbones.family import Family
from davae.backbones.lora import widen_lora
from davae.backbones.trainable import choose_trainable
from davae.cost.flops import predict_once, text_tokens, transformer_flops
from davae.errors import ModelError
from davae.plan.phase_sizes import text_facts
from davae.pretrained.shapes import BaseShapes, patch_size
from davae.recipes.sections import Lora
from davae.tasks.conditioning import TextConditioning, conditioning
from davae.tasks.noising import choose_objective


class ToyTransformer(ModelMixin, ConfigMixin):
    """One linear layer a token between a patch embedder and a head, and a text that is added."""

    @register_to_config
    def __init__(self, in_channels: int = 2, out_channels: int = 2, patch_size: int = 2, width: int = 8):
        super().__init__()
        self.embedder = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.to_q = nn.Linear(width, width)
        self.head = nn.Linear(width, patch_size**2 * out_channels)

    def forward(self, x: Tensor, text: Tensor, size: int) -> Tensor:
        p, (height, width) = self.config["patch_size"], x.shape[-2:]
        tokens = self.embedder(x).flatten(2).transpose(1, 2)  # (B,hw/pp,width)
        tokens = self.head(self.to_q(tokens) + text.mean(1, keepdim=True) * size)  # (B,hw/pp,ppc)
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (height // p, width // p))  # (B,h/p,w/p,p,p,c)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B,c,h,w)


class ToyCall(SizedCall):
    TEXT_TOKENS = 5

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config["width"]),)

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return (torch.stack([torch.full((self.TEXT_TOKENS, 8), float(len(caption))) for caption in captions]),)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return model(x_t, parts[0], self.pixel_factor)


TOY = Family(
    "ToyTransformer",
    pipeline="ToyPipeline",
    embedder="embedder",
    head="head",
    head_order="patch_channel",
    lora_targets=("to_q",),
    call=ToyCall(),
    attributes=(),
)
SHAPES = BaseShapes("ToyPipeline", "ToyTransformer", "AutoencoderKL", 2, 8, 2, {"width": 8, "patch_size": 2}, {})


class ToyPipeline:
    def __init__(self, **components: Any):
        self.components = components


class Cached:
    """The part of a latent cache that conditioning reads."""

    def embed(self, captions: list[str]) -> Parts:
        return ToyCall().embed(None, captions, {})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyTransformer:
    monkeypatch.setitem(FAMILIES, "ToyTransformer", TOY)
    torch.manual_seed(0)
    return ToyTransformer()


def test_it_is_found_by_class_model_and_pipeline(toy: ToyTransformer):
    assert family_by_class("ToyTransformer") is family_of(toy) is family_of(ToyPipeline(transformer=toy)) is TOY
    assert TOY in supported()
    assert TOY.trains
    with pytest.raises(ValueError, match=f"the nearest of {len(FAMILIES)} that are: ToyTransformer, "):
        family_by_class("ToyTransformers")
    with pytest.raises(ModelError, match="a ToyPipeline has no transformer or U-Net"):
        family_of(ToyPipeline(vae=None))


def test_without_its_entry_nothing_knows_it():
    with pytest.raises(ValueError, match="transformer class ToyTransformer is not supported"):
        expand_transformer(ToyTransformer(), 4)


def test_another_name_in_the_pipeline_is_the_family_s_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "ToyTransformer", Family(**{**vars(TOY), "component": "prior"}))
    model = ToyTransformer()
    assert component_in({"vae": 1, "prior": 2}) == "prior"
    assert denoiser(ToyPipeline(prior=model)) is model


@torch.no_grad()
def test_it_expands_and_keeps_what_it_knew(toy: ToyTransformer):
    wide = expand_transformer(toy, 4)
    assert (latent_channels(toy), latent_channels(wide)) == (2, 6)
    assert wide.config["out_channels"] == 6
    x, text = torch.randn(3, 6, 4, 8), torch.randn(3, 5, 8)
    output = wide(x, text, 8)
    assert torch.allclose(output[:, :2], toy(x[:, :2], text, 8), atol=1e-6)
    assert not output[:, 2:].any()
    masks = new_weight_masks(wide)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "embedder.weight": 8 * 4 * 4,
        "embedder.bias": 0,
        "head.weight": 4 * 4 * 8,
        "head.bias": 4 * 4,
    }


def test_it_trains_by_lora_and_its_lora_files_are_widened(toy: ToyTransformer):
    wide = expand_transformer(toy, 4)
    choose_trainable(wide, Lora(rank=2))
    trained = {name for name, parameter in wide.named_parameters() if parameter.requires_grad}
    assert trained == {
        *(f"{layer}.{kind}" for layer in ("embedder", "head") for kind in ("weight", "bias")),
        *(f"to_q.lora_{side}.default.weight" for side in "AB"),
    }
    file = {"transformer.head.lora_B.weight": torch.randn(8, 2), "transformer.to_q.lora_A.weight": torch.randn(2, 8)}
    widened = widen_lora(file, expand_transformer(toy, 4))
    assert widened["transformer.head.lora_B.weight"].shape == (24, 2)
    assert torch.equal(widened["transformer.to_q.lora_A.weight"], file["transformer.to_q.lora_A.weight"])


@torch.no_grad()
def test_stage_two_calls_it_with_the_pipeline_s_numbers(toy: ToyTransformer):
    conditions = conditioning(toy, Cached(), torch.device("cpu"), pixel_factor=16)  # type: ignore[arg-type]
    assert isinstance(conditions, TextConditioning)
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    found = conditions.predict(toy, x, t, ["ab", ""])
    text = torch.stack([torch.full((5, 8), 2.0), torch.zeros(5, 8)])
    assert torch.equal(found, toy(x, text, 16))
    assert TOY.require_call().for_pipeline(16, None) == ToyCall(pixel_factor=16)
    assert TOY.call == ToyCall(pixel_factor=8)  # the registry's own is not changed
    assert choose_objective(FlowMatchEulerDiscreteScheduler(), TOY, "m").prediction == "flow"
    with pytest.raises(ModelError):
        choose_objective(DDIMScheduler(), TOY, "m")


def test_plans_count_it(toy: ToyTransformer):
    assert text_tokens(toy) == 5
    assert predict_once(toy, toy, torch.randn(2, 2, 4, 4)).shape == (2, 2, 4, 4)
    meta = ToyTransformer().to("meta")
    assert transformer_flops(meta, 8).total == 4 * transformer_flops(meta, 4).total > 0
    assert patch_size(SHAPES.transformer_config, family_by_class(SHAPES.transformer_class)) == 2
    base: Any = SimpleNamespace(text_encoders=[], family=TOY, shapes=SHAPES)
    assert text_facts(base).padded_values == 0  # without text encoders


def test_without_a_call_it_expands_and_is_refused_by_name(toy: ToyTransformer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "ToyTransformer", Family(**{**vars(TOY), "call": None}))
    assert not family_of(toy).trains
    assert latent_channels(expand_transformer(toy, 4)) == 6
    for use in (family_of(toy).require_call, lambda: predict_once(toy, toy, torch.randn(2, 2, 4, 4))):
        with pytest.raises(ModelError, match="widens a ToyTransformer, but davae cannot call or train one yet"):
            use()


def test_calls_of_classes_embed_no_prompts():
    call = family_by_class("DiTTransformer2DModel").require_call()
    assert call.TEXT_TOKENS == 0
    with pytest.raises(NotImplementedError, match="DiTCall takes classes, not prompts"):
        call.embed(None, ["a red square"], {})


@pytest.mark.parametrize("family", supported(), ids=lambda family: family.class_name)
def test_every_call_is_complete(family: Family):
    """Prompts where the condition is text, classes elsewhere; the pipeline's numbers leave the registry's call alone."""
    if family.call is None:
        return
    assert isinstance(family.call, Call)
    assert (
        bool(family.call.TEXT_TOKENS) == (family.condition == "text") == (type(family.call).embed is not Call.embed)
    )
    assert (family.classes_key is not None) == (family.condition == "class")
    bound = family.call.for_pipeline(32, FlowMatchEulerDiscreteScheduler())
    assert type(bound) is type(family.call)
    assert getattr(bound, "pixel_factor", 32) == 32
    assert getattr(family.call, "pixel_factor", 8) == 8
