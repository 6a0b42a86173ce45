"""CDNSR for spandrel (https://github.com/chaiNNer-org/spandrel), so that programs that load networks by it, such as
chaiNNer, open routed ones:

    from spandrel import MAIN_REGISTRY, ModelLoader
    from cdnsr_basicsr.spandrel_support import CDNSR_SUPPORT

    MAIN_REGISTRY.add(CDNSR_SUPPORT)
    model = ModelLoader().load_from_file('routed.safetensors')

spandrel sees only a file's weights; so the description of the network, with its branches and the price at which they
are chosen, is one of them. The network runs by this package's engine, which cuts an image into tiles.
"""
from __future__ import annotations

import torch
from spandrel import Architecture, ArchSupport, ImageModelDescriptor, ModelTiling, StateDict
from torch import nn
from weakref import WeakKeyDictionary

from . import load_plugins
from .checkpoint import DESCRIPTION, build, described_by, weights_of
from .inference import TileUpscaler, default_patch_size

_engines: WeakKeyDictionary[nn.Module, TileUpscaler] = WeakKeyDictionary()


def _upscale(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Upscales an image of shape (1, c, h, w), in [0, 1], on the network's device."""
    engine = _engines.get(net)
    if engine is None or engine.device != image.device:
        engine = _engines[net] = TileUpscaler(net, default_patch_size(net))
    return torch.as_tensor(engine.upscale(image).image)


class CDNSRArch(Architecture[nn.Module]):
    """CDNSR and ClassSR networks in this package's files, with branches of any kind."""

    def __init__(self) -> None:
        super().__init__(id='CDNSR', detect=self._is_cdnsr)

    @staticmethod
    def _is_cdnsr(state_dict: StateDict) -> bool:
        try:
            return described_by(state_dict[DESCRIPTION])['type'] == 'CDNSR'
        except (AttributeError, KeyError, TypeError, ValueError):
            return False

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[nn.Module]:
        """Builds the network that the weights describe.

        Raises:
            OptionError: They do not fit the description.
        """
        load_plugins()
        block = described_by(state_dict[DESCRIPTION])
        net = build(block, weights_of({'params': state_dict}, 'the file'), 'the file', 'the file')
        engine = TileUpscaler(net, default_patch_size(net))
        return ImageModelDescriptor(
            net,
            state_dict,
            architecture=self,
            purpose='SR',
            tags=[branch['type'] for branch in block['branches']],
            supports_half=False,
            supports_bfloat16=False,
            scale=int(engine.scale),
            input_channels=engine.channels,
            output_channels=engine.channels,
            tiling=ModelTiling.INTERNAL,
            call_fn=_upscale)


CDNSR_SUPPORT = ArchSupport.from_architecture(CDNSRArch())
