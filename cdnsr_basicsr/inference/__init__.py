"""Engines: what upscales images of any size by a network."""
from __future__ import annotations

from torch import nn
from typing import Any, Optional

from ..complexity import count_macs
from . import pixel_upscaler, tiling
from .network import common_geometry, maps_errors, pixel_routed, routed
from .pixel_upscaler import PixelUpscaler
from .tile_upscaler import TileUpscaler
from .tiling import Tiling
from .upscaler import Upscaled, Upscaler

__all__ = ['PixelUpscaler', 'TileUpscaler', 'Tiling', 'Upscaled', 'Upscaler', 'default_patch_size', 'make_upscaler']


def default_patch_size(net: nn.Module) -> int:
    """Largest side of a tile, in LR pixels, that a network's engine takes if none is given."""
    if pixel_routed(net) is not None:
        return pixel_upscaler.PATCH_SIZE
    tiles = routed(net)
    if tiles is None or maps_errors(tiles.classifier) is None:
        return tiling.PATCH_SIZE
    # transformers pad to their windows, which a little less than the usual size may save
    windowed = [
        branch for branch in tiles.branches if any(isinstance(module, nn.Linear) for module in branch.modules())
    ]
    channels = common_geometry(windowed)[1] if windowed else 0

    def work(size: int) -> float:
        return sum(count_macs(branch, size, size, channels) for branch in windowed) / (size - tiling.OVERLAP)**2

    return min((tiling.MAPPED_PATCH_SIZE, tiling.MAPPED_PATCH_SIZE - tiling.OVERLAP), key=work)


def make_upscaler(net: nn.Module,
                  patch_size: Optional[int] = None,
                  step: Optional[int] = None,
                  **kwargs: Any) -> Upscaler:
    """The engine for a network; arguments are those of its class.

    Raises:
        ValueError: The network is none for super-resolution, or the engine has no such argument.
    """
    kwargs['patch_size'] = default_patch_size(net) if patch_size is None else patch_size
    if pixel_routed(net) is not None:
        kwargs.pop('float32_branches', None)
        return PixelUpscaler(net, step=step, **kwargs)
    scale = kwargs.pop('scale', None)
    upscaler = TileUpscaler(net, step=step, **kwargs)
    if scale not in (None, upscaler.scale):
        raise ValueError(f'{type(net).__name__} has a fixed scale, {upscaler.scale}; only PCSR networks can change it')
    return upscaler
