"""What an engine has to know of a network: its kind, its images, and how to make a fast copy of it.

Networks tell what they can do by attributes; only this module asks for these.
"""
from __future__ import annotations

import copy
import itertools
import math
import torch
from contextlib import suppress
from torch import nn
from typing import Any, List, Optional, Protocol, Sequence, Tuple, cast

from ..options.schema import Routing
from ..settings import PRECISIONS as NAMES
from .speed import is_out_of_memory
from .tiling import LEAST_SIZE, pad_to

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}
MOST_MULTIPLE = 128  # of the sides of images that is looked for

Weights = List[Tuple[torch.Tensor, int]]  # a network's, and their versions


class Routed(Protocol):
    """A network whose classifier chooses a branch for each tile, as CDNSR and ClassSR do."""
    classifier: nn.Module
    branches: nn.ModuleList
    upscale: int


class PixelRouted(Protocol):
    """A network that has a sampler for each pixel, as PCSR does; see there."""
    upscale: int
    num_in_ch: int
    k: float
    adaptive: bool
    refinement: bool
    backbone_macs: float
    classifier: Any
    samplers: Sequence[Any]
    heavy: Any

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of an image."""

    def grid(self, size: tuple[int, int], out_size: tuple[int, int], device: torch.device) -> Any:
        """Where the pixels of the result lie in the image."""

    def margin(self, features: torch.Tensor, grid: Any) -> torch.Tensor:
        """How much more a pixel needs the heavy sampler than the light one."""

    def threshold(self, margin: torch.Tensor) -> torch.Tensor:
        """The margin from which on the heavy sampler is taken."""

    def sample(self, features: torch.Tensor, grid: Any, heavy: torch.Tensor, count: Optional[int]) -> torch.Tensor:
        """Pixels, each by its sampler."""

    def bilinear(self, lq: torch.Tensor, size: tuple[int, int], out_size: tuple[int, int], top: int, bottom: int,
                 lq_top: int) -> torch.Tensor:
        """What pixels are added to."""

    def refine(self, image: torch.Tensor, heavy: torch.Tensor) -> torch.Tensor:
        """Smooths light pixels beside heavy ones."""


class PredictsErrors(Protocol):
    """A classifier whose logits stand for the squared errors of the branches, as those of an ErrorPredictor do."""
    price: float
    costs: torch.Tensor

    def errors(self, logits: torch.Tensor) -> torch.Tensor:
        """The predicted errors, in grey levels."""


class MapsErrors(PredictsErrors, Protocol):
    """One that predicts them for every cell of an image."""
    cell: int
    reach: int

    def error_map(self, x: torch.Tensor) -> torch.Tensor:
        """Errors of the cells of an image, of shape (b, M, ceil(h / cell), ceil(w / cell))."""


def precision_of(net: nn.Module, wanted: str) -> str:
    """The precision that is wanted, where a network can run in it; float32 otherwise."""
    return wanted if wanted in getattr(net, 'precisions', NAMES) else 'float32'


def routed(net: nn.Module) -> Optional[Routed]:
    """The network, if it has a classifier that chooses between branches."""
    return cast(Routed, net) if hasattr(net, 'classifier') and hasattr(net, 'branches') else None


def pixel_routed(net: nn.Module) -> Optional[PixelRouted]:
    """The network, if it has a sampler for each pixel."""
    known = all(hasattr(net, name) for name in ('features', 'margin', 'sample', 'samplers'))
    return cast(PixelRouted, net) if known else None


def predicts_errors(classifier: Optional[nn.Module]) -> Optional[PredictsErrors]:
    """The classifier, if it predicts errors."""
    known = all(hasattr(classifier, name) for name in ('errors', 'price', 'costs'))
    return cast(PredictsErrors, classifier) if known else None


def maps_errors(classifier: Optional[nn.Module]) -> Optional[MapsErrors]:
    """The classifier, if it predicts errors for every cell of an image."""
    return cast(MapsErrors, classifier) if hasattr(classifier, 'error_map') else None


def branches_of(net: nn.Module) -> list[nn.Module]:
    """The branches of a network; of one without any, itself."""
    parts = routed(net)
    return [net] if parts is None else list(parts.branches)


def reference_of(classifier: Optional[nn.Module]) -> Optional[str]:
    """What the errors that a classifier predicts are relative to: 'gt', or 'hardest', the last branch's image; None if
    it predicts none."""
    return None if predicts_errors(classifier) is None else str(getattr(classifier, 'reference', 'gt'))


def arch_of(net: nn.Module) -> str:
    """Name of a network's arch, also of one that another runtime computes."""
    return str(getattr(net, 'known_arch', type(net).__name__))


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """Branches of a network by name, and then its classifier, if it has one."""
    parts = {f'branch_{i}': branch for i, branch in enumerate(branches_of(net))}
    with_classifier = routed(net)
    return parts if with_classifier is None else {**parts, 'classifier': with_classifier.classifier}


def route(net: nn.Module, routing: Routing) -> None:
    """Sets how a network routes pixels, by k, adaptive and refinement of an option file's block."""
    pixels = pixel_routed(net)
    if pixels is not None:
        pixels.k, pixels.adaptive, pixels.refinement = routing.k, routing.adaptive, routing.refinement


def deployed(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network for inference: channels last, rewritten where the arch knows a faster form of itself.

    Weights of convs and linear layers are kept in `dtype`, because autocast would convert them at every call; but for
    layers that the arch runs in float32 whatever autocast says (`keeps_float32`).
    """
    net = copy.deepcopy(net).requires_grad_(False).eval()
    for module in list(net.modules()):
        if hasattr(module, 'switch_to_deploy'):
            cast(Any, module).switch_to_deploy()
    if dtype != torch.float32:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and not hasattr(module, 'keeps_float32'):
                module.to(dtype)
    return net.to(memory_format=torch.channels_last)


def weights_of(net: nn.Module) -> Weights:
    """A network's weights and their versions, which change when the weights do."""
    return [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in [*net.parameters(), *net.buffers()]]


def same_weights(state: Weights, other: Weights) -> bool:
    """Whether two results of `weights_of` belong to the same, unchanged weights."""
    return len(state) == len(other) and all(tensor is copied and version == then
                                            for (tensor, version), (copied, then) in zip(state, other))


def device_of(net: nn.Module) -> torch.device:
    """Where a network is; of one without weights its buffers say so."""
    return next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0)).device


def probe(net: nn.Module, channels: int, size: int) -> tuple[tuple[int, ...], str]:
    """Shape of what a network makes of an image of one gray, without the batch, () if that is no image; and, if it
    cannot, what it says.
    """
    device = device_of(net)
    was_training = net.training
    try:
        with torch.no_grad():  # no inference tensors: some networks keep what they have converted
            output = net.eval()(torch.zeros(1, channels, size, size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error) or 'CUDA' in str(error) or 'cuDNN' in str(error):
            raise
        # a wrong number of channels or pixels, as each layer puts it
        return (), ' '.join(str(error).split())[:120] or type(error).__name__
    finally:
        net.train(was_training)
    return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) and output.dim() == 4 else (), ''


def geometry(net: nn.Module, channels: Sequence[int] = (3, 1)) -> tuple[int, int, int]:
    """Upsampling factor of a network, channels of its images, and the number that sides must be multiples of.

    Found by running it on square images, mostly of 16 and 17 pixels; where sides must be multiples, up to the first two
    that it takes. A network that knows (attribute `known_geometry`) is asked.

    Args:
        net: The network.
        channels: Channels to try.

    Raises:
        ValueError: It makes no image of a whole multiple of its input's size out of these channels, or only of images
            of one size.
    """
    if hasattr(net, 'known_geometry'):
        return cast(Tuple[int, int, int], net.known_geometry)
    name, reasons = type(net).__name__, dict[int, str]()
    for sizes in ((LEAST_SIZE, 32, 64), range(LEAST_SIZE + 1, MOST_MULTIPLE + 1)):
        for count, size in itertools.product(channels, sizes):
            shape, reason = probe(net, count, size)
            if not reason:
                return _geometry_from(net, count, size, shape)
            reasons.setdefault(count, f'{count} channel{"s" * (count != 1)}: {reason}')
    raise ValueError(
        f'{name} accepts no square of {LEAST_SIZE} to {MOST_MULTIPLE} pixels, of {"; of ".join(reasons.values())}')


def _geometry_from(net: nn.Module, channels: int, size: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """As `geometry`, given the shape of what a network makes of the first size that it takes."""
    name = type(net).__name__
    if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2] or shape[1] % size:
        raise ValueError(
            f'{name} makes {shape or "no image"} from ({channels}, {size}, {size}): not a super-resolution network')
    scale = shape[1] // size
    for multiple in range(1, size + 1):
        larger = size + multiple
        if probe(net, channels, larger)[0] == (channels, scale * larger, scale * larger):
            break
    else:
        raise ValueError(f'{name} accepts no square images except those of {size} pixels')
    if size % multiple:
        raise ValueError(f'{name} accepts square images of {size} and {larger} pixels, but none between')
    return scale, channels, multiple


def common_geometry(nets: Sequence[nn.Module]) -> tuple[int, int, int]:
    """As `geometry`, of networks, or of their branches, that the same images go through: their multiple is the least
    common one.

    Raises:
        ValueError: One of them has no geometry, or they differ in scale or channels.
    """
    nets = [branch for net in nets for branch in branches_of(net)]
    found = [geometry(net) for net in nets]
    if len({channels for _, channels, _ in found}) > 1:  # some, such as Interpolation, take any number
        with suppress(ValueError):
            found = [geometry(net, (1, )) for net in nets]
    if len({kind[:2] for kind in found}) > 1:
        raise ValueError(f'the branches differ in scale or channels: {[kind[:2] for kind in found]}')
    return (*found[0][:2], math.lcm(*(multiple for _, _, multiple in found)))


@torch.no_grad()
def run_padded(net: nn.Module, x: torch.Tensor, scale: int, multiple: int) -> torch.Tensor:
    """What a network makes of images of any size: they are padded to its multiple, and the result is cropped.

    Args:
        net: The network.
        x: The images, of shape (b, c, h, w), in [0, 1].
        scale, multiple: See `geometry`.

    Returns:
        Images of shape (b, c, h * scale, w * scale).
    """
    height, width = x.shape[2:]
    sides = [-(-side // multiple) * multiple for side in (height, width)]
    if sides == [height, width]:
        return cast(torch.Tensor, net(x))
    padded = pad_to(x.flatten(0, 1), *sides).unflatten(0, x.shape[:2])
    return cast(torch.Tensor, net(padded)[..., :height * scale, :width * scale])
