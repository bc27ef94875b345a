"""Diffusers pipeline for class-conditional models: LightningDiT, SiT, DiT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, SupportsIndex

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from davae.backbones.classes import find_class
from davae.backbones.detail_time import OFFSET
from davae.backbones.lightning_dit import LightningDiT
from davae.pretrained.shapes import pixel_factor
from davae.sample.levels import takes_generator
from davae.sample.ode import GuidedModel, OnStep, solve_ode, stepped, time_grid
from davae.vae.codec import Codec

OnStepEnd = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]
Class = SupportsIndex | str


class ClassConditionalPipeline(DiffusionPipeline):
    """Pipeline that draws images of classes.

    Load a folder with `ClassConditionalPipeline.from_pretrained`.

    Args:
        vae: a diffusers autoencoder; its latents are normalised by its own statistics.
        transformer: a LightningDiT, or the same class with the weights of SiT or DiT.
        scheduler: for models that predict epsilon (DiT), a diffusers scheduler; velocity models need none.
        class_names: a name per class, by which a call may then give classes.
        timestep_shift, cfg_interval_start, cfg_channels: how these weights are meant to be sampled; see
            `davae.sample.euler_ode`. A call may override them.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["scheduler"]

    def __init__(
        self,
        vae: Any,
        transformer: LightningDiT,
        scheduler: Any = None,
        class_names: list[str] | None = None,
        timestep_shift: float = 1.0,
        cfg_interval_start: float = 0.0,
        cfg_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            class_names=class_names,
            timestep_shift=timestep_shift,
            cfg_interval_start=cfg_interval_start,
            cfg_channels=cfg_channels,
        )
        self.vae_scale_factor: int = pixel_factor(self)
        self.patch_size = transformer.config["patch_size"]
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Return a pipeline of another one's components, the autoencoder of any class included."""
        return super().from_pipe(pipeline, **{"vae": pipeline.vae, **kwargs})  # diffusers compares exact classes

    @property
    def class_names(self) -> list[str]:
        """Return a name per class, or an empty list."""
        return list(self.config["class_names"] or [])

    def class_number(self, label: Class) -> int:
        """Return the number of a class that is given by number, by name or by a part of its name.

        Raises:
            ValueError: no such class, or several.
        """
        names = {name: number for number, name in enumerate(self.class_names)}
        return find_class(label, names, int(self.transformer.config["num_classes"]))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Class | Sequence[Class] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        solver: str = "euler",
        timestep_shift: float | None = None,
        cfg_interval_start: float | None = None,
        cfg_channels: int | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        detail_offset: float | None = None,
        clean_base: bool = False,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images of classes.

        Args:
            prompt: one or more classes, by number or name; arrays and tensors hold numbers.
            height, width: pixels, equal; another size than the model's own runs the weights on an interpolated grid.
            num_inference_steps: updates of the ODE (the official `num_steps` minus one).
            guidance_scale: 1 or less turns guidance off.
            generator: for the starting noise; a list gives one per image.
            latents: starting noise (B,c,h,w) instead.
            output_type: `pil`, `np`, `pt` (in [0,1]), or `latent`.
            solver: `euler` or `heun`; a pipeline with a scheduler uses that.
            callback_on_step_end: called as diffusers does, with `latents`, which returned ones replace.
            detail_offset: how far the base is ahead, where the detail has a time of its own; the model's unless given.
            clean_base: the base in `latents` is clean and stays as it is, for the same models.

        Raises:
            ValueError: unknown class, a size that does not divide, an unknown solver, an offset for another model.
        """
        several = getattr(prompt, "ndim", isinstance(prompt, Sequence) and not isinstance(prompt, str))
        labels: Any = prompt if several else [prompt]
        numbers = [self.class_number(label) for label in labels for _ in range(num_images_per_prompt)]
        noise = self._noise(latents, len(numbers), self._latent_side(height, width), generator)
        shift, start, channels = self._settings(timestep_shift, cfg_interval_start, cfg_channels)
        guidance = {"cfg_scale": guidance_scale, "cfg_channels": channels}
        bar: Any = self.progress_bar(total=num_inference_steps)  # type: ignore[call-arg]  # decorated wrongly upstream
        on_step = partial(self._step_done, bar, num_inference_steps, callback_on_step_end)
        with self.transformer.at_grid(noise.shape[-1]), bar:
            classes, points = torch.tensor(numbers, device=noise.device), num_inference_steps + 1
            if self.transformer.config["prediction_type"] == "epsilon":
                x = self._denoise(classes, guidance, noise, num_inference_steps, generator, on_step)
            else:
                times = self._times(points, shift, detail_offset, clean_base)
                x = solve_ode(
                    self.transformer, noise, classes, points, solver=solver, on_step=on_step, times=times,
                    cfg_interval_start=start, **guidance,
                )  # fmt: skip
        images: Any = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _settings(self, *given: Any) -> Iterator[Any]:
        """Yield shift, interval start and guided channels, the weights' own where none are given."""
        names = ("timestep_shift", "cfg_interval_start", "cfg_channels")
        return (self.config[name] if call is None else call for call, name in zip(given, names, strict=True))

    def _times(self, points: int, shift: float, detail_offset: float | None, clean_base: bool) -> Tensor:
        """Return the times of the grid points, (points,), or (points,2) of base and detail.

        Callbacks read the noise levels of base and detail from `self.times` and `self.detail_times`.
        """
        times = self._grid(points, shift, detail_offset, clean_base)
        self.times, self.detail_times = (times, times) if times.ndim == 1 else times.unbind(1)
        return times

    def _grid(self, points: int, shift: float, detail_offset: float | None, clean_base: bool) -> Tensor:
        if not self.transformer.config["detail_channels"]:
            if detail_offset or clean_base:
                raise ValueError(
                    "detail_offset and clean_base: all channels of this model share one time; leave them out, or train an "
                    "upgrade with stage2.detail_offset"
                )
            return time_grid(points, shift)
        if clean_base:
            times = time_grid(points, shift)
            return torch.stack([torch.ones_like(times), times], dim=1)
        own = self.transformer.config[OFFSET] if detail_offset is None else detail_offset
        if not 0 <= own <= 1:
            raise ValueError(f"detail_offset is {own}; use a number from 0 to 1")
        return time_grid(points, shift, own)

    def _step_done(self, bar: Any, steps: int, callback: OnStepEnd | None, step: int, x: Tensor) -> Tensor:
        """Advance the progress bar, and return the latents after the callback."""
        bar.update()
        if callback is None:
            return x
        changed = callback(self, step, (step + 1) / steps, {"latents": x})
        return (changed or {}).get("latents", x)

    def _noise(self, latents: Tensor | None, count: int, side: int, generator: Any) -> Tensor:
        """Return starting noise (B,c,h,w) on the pipeline's device, given or drawn."""
        shape = (count, self.transformer.config["in_channels"], side, side)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected {shape}")
        return latents.to(device, dtype)

    def _latent_side(self, height: int | None, width: int | None) -> int:
        size: int = self.transformer.config["input_size"] * self.vae_scale_factor
        high, wide = height or width or size, width or height or size
        step = self.vae_scale_factor * self.patch_size
        if high != wide or high % step:
            raise ValueError(f"{wide}x{high} pixels: this model draws squares whose side is divisible by {step}")
        return high // self.vae_scale_factor

    def _denoise(
        self, classes: Tensor, guidance: dict[str, Any], x: Tensor, steps: int, generator: Any, on_step: OnStep
    ) -> Tensor:
        """Sample an epsilon model under its diffusers scheduler, as DiT is sampled."""
        guided = GuidedModel(self.transformer, classes, **guidance)
        if self.scheduler is None:
            raise ValueError("this model predicts epsilon: the pipeline needs a scheduler, e.g. DDIMScheduler")
        options: dict[str, Any] = {"generator": generator} if takes_generator(self.scheduler) else {}
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        self.scheduler.set_timesteps(steps, device=x.device)
        for step, t in enumerate(self.scheduler.timesteps):
            output = guided(self.scheduler.scale_model_input(x, t), float(t))
            if not learned:
                output = output[:, : x.shape[1]]  # the scheduler sets its own variance
            x = self.scheduler.step(output, t, x, **options).prev_sample
            x = stepped(on_step, step, x)
        return x

    def _decode(self, x: Tensor, output_type: str) -> Any:
        """Decode normalised latents (B,c,h,w) into images."""
        pixels = Codec(self.vae).decode(x.float())  # (B,3,H,W)
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)
