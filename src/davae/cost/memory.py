"""Memory and FLOPs of a training step and of sampling, from a rehearsal on fake tensors.

The rehearsal runs the real modules, losses and backward pass under torch's FakeTensorMode and adds up the storages that
operators allocate while they live. What a device's libraries keep besides (CUDA context, workspaces, fragmentation) comes on
top.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from davae.backbones.expand import expand_transformer, latent_channels
from davae.backbones.trainable import choose_trainable, in_full_precision
from davae.cost.flops import decode_latents, meta_detail_vae, meta_transformer, predict_once
from davae.cost.frozen_features import Undrawn, held_base_cost, meta_features
from davae.cost.repeated_blocks import Repeats
from davae.latent import LatentLayout
from davae.losses.perceptual import perceptual_distance
from davae.losses.velocity import velocity_loss
from davae.pretrained.shapes import BaseShapes
from davae.recipes.sections import Stage1, Stage2
from davae.tasks.dit_alignment import FrozenFeatures
from davae.tasks.polish import PolishTask
from davae.tasks.stage1 import Stage1Task
from davae.vae.codec import Codec
from davae.vae.detail_vae import DetailVAE

# the attention that CPU tensors get, which the registry lacks
FORMULAS: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
    **flop_registry,
}


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensors that operators allocate, and FLOPs.

    Tensors from outside are not counted. (torch's FlopCounterMode keeps tensors that checkpointing would free.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0.0
        self._known: dict[int, int] = {}  # storage -> bytes, 0 for those from outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._track(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._track(storage, storage.nbytes())
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _track(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _storages(values: Any) -> Iterator[Any]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


class Mixed(nn.Module):
    """A module that runs under autocast and returns float32, as accelerate wraps modules."""

    def __init__(self, module: nn.Module, enabled: bool):
        super().__init__()
        self.module, self.enabled = module, enabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            out = self.module(*args, **kwargs)
        return tree_map_only(Tensor, lambda value: value.float() if value.is_floating_point() else value, out)


@dataclass(frozen=True)
class TrainingStep:
    """Bytes on one device while one stage trains, and the work of a step.

    Attributes:
        weights: of the networks in the step, float32 (trained, frozen, and those of the losses).
        gradients: once they are all there.
        optimizer: AdamW's two moments.
        ema: the average of the trained weights.
        activations: the most that a forward and a backward pass hold, with the gradients that exist by then.
        flops: of one forward and backward pass over a batch, with what checkpointing computes again.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    flops: float

    @property
    def peak(self) -> int:
        """Gradients fill up while activations are freed, so that the two do not add."""
        return self.weights + self.optimizer + self.ema + self.activations

    def as_dict(self) -> dict[str, int]:
        """Bytes by name."""
        names = ("weights", "gradients", "optimizer", "ema", "activations", "peak")
        return {name: getattr(self, name) for name in names}


@contextmanager
def fake_mode() -> Iterator[None]:
    """Tensors made inside have shapes but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_parameters(module: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones, and a shared tensor by one fake tensor.

    `to_empty` cannot replace a shared tensor twice.
    """
    made: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    fake = torch.empty_like(tensor, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if tensors is part._parameters else fake
                    )
                tensors[name] = made[id(tensor)]


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a module in place, without diffusers' advice on loading weights in a precision."""
    return nn.Module.to(module, dtype)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _memory(
    modules: list[nn.Module],
    step: Callable[[], None],
    passes: int,
    *,
    averaged: list[nn.Parameter],
    repeats: Repeats | None = None,
) -> TrainingStep:
    """Return memory and FLOPs of `passes` forward-backward passes, whose gradients add up.

    Args:
        repeats: equal blocks of the modules, on the meta device; few are rehearsed for all. The rest is not on it.
    """
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    buffers = [buffer for module in modules for buffer in module.buffers()]
    trained = bytes_of(p for p in parameters if p.requires_grad)
    weights, average = bytes_of(parameters) + bytes_of(buffers), bytes_of(averaged)

    def measure() -> tuple[float, ...]:
        for module in modules:
            fake_parameters(module)
        live = LiveBytes()
        with live:
            for module in modules:
                for parameter in module.parameters():
                    late = parameter.requires_grad and passes > 1  # a later pass begins with all gradients
                    parameter.grad = torch.empty_like(parameter) if late else None
            step()
        return live.peak, live.flops

    peak, flops = measure() if repeats is None else repeats.whole(measure)
    return TrainingStep(
        weights=weights,
        gradients=trained,
        optimizer=2 * trained,
        ema=average,
        activations=int(peak),
        flops=flops,
    )


def stage2_memory(
    shapes: BaseShapes,
    layout: LatentLayout,
    side: int,
    settings: Stage2,
    *,
    mixed: bool,
    frozen: torch.dtype = torch.float32,
) -> TrainingStep:
    """Return one process's step of stage 2 by the recipe's batch, accumulation, checkpointing.

    Args:
        frozen: precision of the pretrained weights that are not trained, and of the transformer of `stage2.hold_base`.
    """
    with torch.device("meta"):  # for the new weights and LoRA's
        pretrained = converted(meta_transformer(shapes), frozen)
        transformer = expand_transformer(pretrained, layout.detail_channels, detail_offset=settings.detail_offset)
        in_full_precision(choose_trainable(transformer, settings.lora))
    transformer.train()
    if settings.gradient_checkpointing:
        cast(Any, transformer).enable_gradient_checkpointing()
    averaged = [p for p in transformer.parameters() if p.requires_grad and settings.ema_decay]
    with fake_mode():
        model = Mixed(transformer, mixed)
        latents = torch.empty(settings.batch_size, layout.channels, side, side)

        def step() -> None:
            prediction = predict_once(model, transformer, latents)
            velocity_loss(prediction, latents, layout, 1.0).total.backward()

        repeats = Repeats(transformer)
        found = _memory([transformer], step, settings.accumulation, averaged=averaged, repeats=repeats)
    weights, flops = held_base_cost(shapes, layout, side, settings, frozen)
    return replace(found, weights=found.weights + weights, flops=found.flops + flops)


def stage1_memory(
    shapes: BaseShapes,
    detail_channels: int,
    scale: int,
    resolution: int,
    settings: Stage1,
    *,
    mixed: bool,
    frozen: torch.dtype = torch.float32,
) -> TrainingStep:
    """Return one process's step of stage 1 with the discriminator and the perceptual network.

    Args:
        frozen: precision of the transformer of `stage1.dit_alignment`.
    """
    vae = meta_detail_vae(shapes, detail_channels, scale)
    with torch.device("meta"):
        features = meta_features(shapes, vae.layout, settings, frozen)
    return _autoencoder_memory(
        partial(Stage1Task, features=features), vae, resolution, settings, features, mixed=mixed
    )


def polish_memory(
    shapes: BaseShapes, detail_channels: int, scale: int, resolution: int, settings: Stage1, *, mixed: bool
) -> TrainingStep:
    """Return one process's step of the polish, with gradients of the decoder alone.

    Args:
        settings: `Stage1.polishing`.
    """
    vae = meta_detail_vae(shapes, detail_channels, scale)
    return _autoencoder_memory(PolishTask, vae, resolution, settings, mixed=mixed)


def _autoencoder_memory(
    make: Callable[..., Stage1Task | PolishTask],
    vae: DetailVAE,
    resolution: int,
    settings: Stage1,
    features: FrozenFeatures | None = None,
    *,
    mixed: bool,
) -> TrainingStep:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in an old way
        without = settings.model_copy(update={"lambda_lpips": 0.0})
        task = make(without, vae, cast(Any, ()), torch.device("meta"))
        perceptual = perceptual_distance(settings.perceptual, random=True) if settings.lambda_lpips else None
    parts = [vae, task.trainer.discriminator, perceptual]
    if features is not None:
        parts += [features.transformer, task.modules["dit_alignment"]]
    modules = [module for module in parts if module is not None]
    with fake_mode():
        task.device = torch.device("cpu")
        if features is not None:
            features.null = tuple(torch.empty_like(part, device="cpu") for part in features.null)
        task.trainer.settings, task.trainer.perceptual = settings, perceptual
        task.modules = {name: Mixed(module, mixed) for name, module in task.modules.items()}
        images = torch.empty(settings.batch_size, 3, resolution, resolution)
        draws = Undrawn(settings.batch_size)
        last = settings.max_steps + settings.gan_start  # any step at which the discriminator plays

        def step() -> None:
            for player in task.trainables_at(last):
                task.loss(player, {"images": images}, last, draws)[0].backward()

        averaged = [p for p in vae.parameters() if p.requires_grad] if settings.ema_decay else []
        return _memory(modules, step, settings.accumulation, averaged=averaged)


def sampling_bytes(run: Callable[[], object]) -> int:
    """Return the peak bytes of a computation without gradients, apart from weights and inputs.

    Call it inside `fake_mode`.
    """
    live = LiveBytes()
    with torch.no_grad(), live:
        run()
    return live.peak


def transformer_sampling_bytes(
    transformer: nn.Module, side: int, batch: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return the peak bytes of one pass over a batch of side x side latents.

    Args:
        transformer: on the meta device; it is used up.
    """
    with fake_mode():
        repeats = Repeats(converted(transformer, dtype))
        if repeats.lengths:  # a pass without gradients holds one block's activations at a time, whatever their number
            repeats.shorten()
        fake_parameters(transformer)
        latents = torch.empty(batch, latent_channels(transformer), side, side, dtype=dtype)
        return sampling_bytes(lambda: predict_in(dtype, transformer, latents))


def decode_sampling_bytes(
    vae: Any, channels: int, side: int, dtype: torch.dtype = torch.bfloat16, tile: int | None = None
) -> int:
    """Return the peak bytes of decoding one image, whole or in tiles of `tile` pixels.

    Args:
        vae: an autoencoder on the meta device; it is used up.
        channels, side: of the latents.
    """
    with fake_mode():
        fake_parameters(converted(vae, dtype))
        if tile is not None:
            vae.enable_tiling(tile)
        latents = torch.empty(1, channels, side, side, dtype=dtype)
        return sampling_bytes(lambda: decode_latents(vae, latents))


def encode_bytes(vae: Any, pixels: int, dtype: torch.dtype, tile: int | None = None) -> int:
    """Return the most that encoding one square image holds, whole or in tiles of `tile` pixels.

    Args:
        vae: an autoencoder on the meta device; it is used up.
    """
    with fake_mode():
        fake_parameters(converted(vae, dtype))
        if tile is not None:
            vae.enable_tiling(tile)
        images = torch.empty(1, 3, pixels, pixels, dtype=dtype)
        return images.numel() * images.element_size() + sampling_bytes(lambda: Codec(vae).encode_raw(images))


def predict_in(dtype: torch.dtype, transformer: nn.Module, latents: Tensor) -> Tensor:
    """`predict_once` with every new floating tensor of that type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return predict_once(transformer, transformer, latents)
    finally:
        torch.set_default_dtype(before)
