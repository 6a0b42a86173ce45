"""Networks of spandrel as an arch of BasicSR's registry; it needs spandrel, so it does not go upstream."""
from __future__ import annotations

import importlib.util
import torch
from torch import nn
from torch.nn import functional as F
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY


def spandrel_registry() -> Any:
    """spandrel's registry of architectures; with those of spandrel_extra_arches, where that is installed.

    Raises:
        ImportError: spandrel is not installed.
    """
    try:
        from spandrel import MAIN_REGISTRY
    except ImportError as error:
        raise ImportError("community checkpoints need spandrel: pip install 'cdnsr-basicsr[spandrel]' "
                          '(Python 3.10 or newer)') from error
    if importlib.util.find_spec('spandrel_extra_arches'):
        importlib.import_module('spandrel_extra_arches').install(ignore_duplicates=True)
    return MAIN_REGISTRY


def check_upscales(descriptor: Any) -> None:
    """Refuses what spandrel has loaded if it is no super-resolution network for RGB or gray images.

    Args:
        descriptor (spandrel.ModelDescriptor): The network and its properties.

    Raises:
        ValueError: With its architecture and purpose.
    """
    name, channels = descriptor.architecture.name, (descriptor.input_channels, descriptor.output_channels)
    if descriptor.purpose != 'SR':
        raise ValueError(f'{name} is a network for {descriptor.purpose}, not for super-resolution')
    if descriptor.scale < 2:
        raise ValueError(f'{name} makes images of the same size; expected a super-resolution network')
    if channels not in ((3, 3), (1, 1)):
        raise ValueError(f'{name} makes {channels[1]} channels from {channels[0]}; expected 3 from 3, or 1 from 1')


@ARCH_REGISTRY.register()
class Spandrel(nn.Module):
    """A super-resolution network of spandrel, which knows the architectures of most published checkpoints.

    spandrel finds a network's arguments in its weights. So does this: it is empty until weights are loaded, and is
    built of them then. They may have the names of the published file or, as in its own state dict, those with `model.`
    before them. Images that are too small for the network, or of sides that it does not take, are padded by reflection,
    and the result is cropped.

    Code: https://github.com/chaiNNer-org/spandrel

    Args:
        architecture (str): Name of the architecture in spandrel, for instance 'DAT'.
        upscale (int): Upsampling factor, which the weights have to be of. Default: 4.
        num_in_ch (int): Channel number of inputs and outputs, 3 or 1, likewise. Default: 3.

    Attributes:
        known_arch (str): The architecture.
        known_geometry (tuple[int]): Upsampling factor, channels, and what sides must be multiples of, once there are
            weights.
        precisions (tuple[str]): Those in which the network can run, once there are weights.
    """

    def __init__(self, architecture: str, upscale: int = 4, num_in_ch: int = 3) -> None:
        super().__init__()
        registry = spandrel_registry()
        if architecture not in registry:
            known = ', '.join(sorted(support.architecture.id for support in registry))
            raise ValueError(f'Spandrel: unknown architecture {architecture!r}; accepted: {known}.')
        self.architecture, self.upscale, self.num_in_ch = architecture, upscale, num_in_ch
        self.known_arch, self.known_geometry = architecture, (upscale, num_in_ch, 1)
        self.model = None
        self.trainable = True
        self.register_buffer('nothing', torch.empty(0), persistent=False)  # tells the device before weights do

    def requires_grad_(self, requires_grad: bool = True) -> Spandrel:
        self.trainable = requires_grad  # also of weights that come later
        return super().requires_grad_(requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              strict: bool, missing_keys: list[str], *args: Any) -> None:
        weights = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
        published = not all(key.startswith('model.') for key in weights)
        if weights and (published or self.model is None):
            if not published:
                weights = {key[len('model.'):]: value for key, value in weights.items()}
            model = self._build(weights)  # spandrel gives some weights other names
            for key in weights:
                state_dict.pop(prefix + key if published else f'{prefix}model.{key}')
            state_dict.update({f'{prefix}model.{key}': value for key, value in model.state_dict().items()})
        if strict and self.model is None:
            missing_keys.append(f'{prefix}model')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    def _build(self, weights: dict[str, torch.Tensor]) -> nn.Module:
        """The network of these weights; becomes this one's, if there is none yet."""
        try:
            descriptor = spandrel_registry()[self.architecture].architecture.load(weights)
            check_upscales(descriptor)
        except Exception as error:  # wrong weights show in errors of any type; load_state_dict raises this one
            raise RuntimeError(f'Spandrel: cannot build a {self.architecture} from these weights '
                               f'({type(error).__name__}: {" ".join(str(error).split())[:200]})') from error
        if (descriptor.scale, descriptor.input_channels) != (self.upscale, self.num_in_ch):
            raise RuntimeError(f'Spandrel: the weights belong to a {self.architecture} of x{descriptor.scale} and '
                               f'{descriptor.input_channels} channels, not x{self.upscale} and {self.num_in_ch}')
        if self.model is None:
            self.model = descriptor.model.to(self.nothing.device).train(self.training).requires_grad_(self.trainable)
            self.sizes = descriptor.size_requirements
            self.call = getattr(descriptor, '_call_fn', None)  # some make more than an image
            self.known_geometry = (self.upscale, self.num_in_ch, self.sizes.multiple_of)
            half = (('float16', descriptor.supports_half), ('bfloat16', descriptor.supports_bfloat16))
            self.precisions = ('float32', *(name for name, supported in half if supported))
        model: nn.Module = descriptor.model
        return model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        if self.model is None:
            raise RuntimeError(f'Spandrel: this {self.architecture} has no weights yet, from which it is built.')
        h, w = x.shape[-2:]
        right, below = self.sizes.get_padding(w, h)
        if right or below:
            inside = (min(right, w - 1), min(below, h - 1))  # more cannot be reflected
            x = F.pad(x, (0, inside[0], 0, inside[1]), mode='reflect')
            x = F.pad(x, (0, right - inside[0], 0, below - inside[1]), mode='replicate')
        x = self.model(x) if self.call is None else self.call(self.model, x)
        return x[..., :h * self.upscale, :w * self.upscale]

    def extra_repr(self) -> str:
        return f'architecture={self.architecture}, upscale={self.upscale}, num_in_ch={self.num_in_ch}'
