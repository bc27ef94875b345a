"""Methods that make a transformer faster, each a context that ends without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from davae.device import compile_blocks, record_passes
from davae.errors import ModelError
from davae.lab.bench.block_cache import first_block_cached
from davae.lab.bench.clock import Spread, ratio

THRESHOLD = 0.1  # relative change of the first block's residual below which the others are skipped
EVERY = 2  # passes to one that computes attention, where it is taken from earlier ones
LATE = 681  # timesteps of 1,000 below which that begins; diffusers' default
CACHES = ("first-block-cache", "faster-cache")


@contextmanager
def without_helper(transformer: Any) -> Iterator[None]:
    """Leave a transformer as it is."""
    yield


@contextmanager
def first_block_cache(transformer: Any) -> Iterator[None]:
    """Cache by the first block: skip later blocks while the first one's part barely changes.

    diffusers' own implementation is used where it has one.

    Raises:
        ModelError: a transformer without.
    """
    from diffusers.hooks import FirstBlockCacheConfig

    if not hasattr(transformer, "enable_cache"):
        with first_block_cached(transformer, THRESHOLD):
            yield
        return
    transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    try:
        yield
    finally:
        transformer.disable_cache()


@contextmanager
def faster_cache(transformer: Any) -> Iterator[None]:
    """Apply FasterCache's attention: in later timesteps every second pass extrapolates it.

    Its other part, unconditional halves out of conditional ones, knows the inputs of video models only.

    Raises:
        ModelError: a transformer without attention that diffusers' hook reaches.
    """
    from diffusers.hooks import FasterCacheConfig, HookRegistry, apply_faster_cache
    from diffusers.hooks.faster_cache import _FASTER_CACHE_BLOCK_HOOK, _FASTER_CACHE_DENOISER_HOOK

    now = [0]

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = int(kwargs["timestep"].flatten()[0])
        if time > now[0]:  # time runs down within a picture, so this is the next one
            HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        now[0] = time

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=EVERY,
        spatial_attention_timestep_skip_range=(-1, LATE),
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: now[0],
    )
    apply_faster_cache(transformer, config)
    hook = transformer.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        if not any(hooked(module, _FASTER_CACHE_BLOCK_HOOK) for module in transformer.modules()):
            raise ModelError(f"{type(transformer).__name__} has no attention that diffusers' FasterCache reaches")
        yield
    finally:
        hook.remove()
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        for name in (_FASTER_CACHE_DENOISER_HOOK, _FASTER_CACHE_BLOCK_HOOK):
            registry.remove_hook(name, recurse=True)


def hooked(module: nn.Module, name: str) -> bool:
    """Return whether diffusers' hook of a name is on a module."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(name) is not None


def block_layers(transformer: Any) -> list[nn.Linear]:
    """Return the linear layers of a transformer's blocks."""
    inner = [m for blocks in transformer.children() if isinstance(blocks, nn.ModuleList) for m in blocks.modules()]
    return [module for module in inner if isinstance(module, nn.Linear)]


@contextmanager
def fp8(transformer: Any) -> Iterator[None]:
    """Store linear layers of the blocks as float8 (e4m3), cast to the model's precision on use.

    It saves memory. The products themselves are those of the model's precision.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    class Casting(LayerwiseCastingHook):
        """diffusers' hook, which can be removed again: it keeps what it replaces."""

        def initialize_hook(self, module: nn.Module) -> nn.Module:
            self.before = [(parameter, parameter.data) for parameter in module.parameters()]
            return super().initialize_hook(module)

        def deinitalize_hook(self, module: nn.Module) -> nn.Module:
            for parameter, data in self.before:
                parameter.data = data
            return module

    name, layers = "davae_fp8", block_layers(transformer)
    for layer in layers:
        hook = Casting(torch.float8_e4m3fn, layer.weight.dtype, non_blocking=False)
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(hook, name)
    try:
        yield
    finally:
        for layer in layers:
            HookRegistry.check_if_exists_or_initialize(layer).remove_hook(name, recurse=False)


@contextmanager
def int8(transformer: Any) -> Iterator[None]:
    """Compute linear layers of the blocks with int8 weights and activations (torchao).

    Scales are per channel and per token.
    """
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    weights = [(module, module.weight) for module in block_layers(transformer)]
    chosen = {id(module) for module, _ in weights}
    quantize_(
        transformer, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: id(module) in chosen
    )
    try:
        yield
    finally:
        for module, weight in weights:
            module.weight = weight
            vars(module).pop("extra_repr", None)  # torchao's


@contextmanager
def compiled(transformer: Any) -> Iterator[None]:
    """Every block through `torch.compile`."""
    compile_blocks(transformer)
    try:
        yield
    finally:
        for module in transformer.modules():
            module._compiled_call_impl = None


@contextmanager
def cuda_graphs(transformer: Any) -> Iterator[None]:
    """Whole passes recorded, as `--compile graphs` does it."""
    record_passes(transformer)
    try:
        yield
    finally:
        transformer._compiled_call_impl = None


HELPERS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "plain": without_helper,
    "compiled": compiled,
    "cuda-graphs": cuda_graphs,
    "first-block-cache": first_block_cache,
    "faster-cache": faster_cache,
    "int8": int8,
    "fp8": fp8,
}


def check_helpers(names: Sequence[str], passes: int | None = None) -> None:
    """Refuse, before anything is measured, what cannot be.

    Args:
        names: helpers, or several joined by `+`, as `int8+compiled`.
        passes: how many there are of a picture, if it is one, as caches have nothing to reuse then.

    Raises:
        ModelError: an unknown helper, one whose package is not installed, or a cache for a single pass.
    """
    for name in names:
        for part in name.split("+"):
            if part not in HELPERS:
                raise ModelError(f"helper '{part}' is unknown; use {', '.join(HELPERS)}, or several joined by +")
            if passes == 1 and part in CACHES:
                raise ModelError(f"helper '{part}' reuses earlier passes, and this is one; use davae bench sample")
            if part == "int8" and find_spec("torchao") is None:
                raise ModelError("helper 'int8' needs torchao: pip install 'davae[int8]'")


@contextmanager
def helped(transformer: Any, name: str) -> Iterator[None]:
    """Return a helper by its name, or several joined by `+`, applied in that order."""
    with ExitStack() as stack:
        for part in name.split("+"):
            stack.enter_context(HELPERS[part](transformer))
        yield


def multiplies(alone: Mapping[str, Spread], with_helper: Mapping[str, Spread]) -> float:
    """Return a helper's speed-up on the upgraded model, relative to that on the native one.

    1 means that it multiplies with the token saving.
    """
    better, native = (ratio(alone[name], with_helper[name]) for name in ("upgraded", "native"))
    return better / native
