"""Checkpoints of the community, in every architecture for super-resolution that spandrel knows."""
from __future__ import annotations

import contextlib

from .registry import Family, Found, Source, register


@register
class SpandrelFamily(Family):
    """What spandrel reads: SwinIR, HAT, DAT, RCAN, ESRGAN, Real-ESRGAN, PLKSR, OmniSR ..."""
    names = ('spandrel', )
    projects = 'networks that spandrel reads'
    files = 'all that spandrel reads, with the extra `spandrel`'
    order = 9  # where no other family knows better

    def detect(self, source: Source) -> bool:
        with contextlib.suppress(ImportError):
            from .spandrel_network import spandrel_registry
            known = spandrel_registry().architectures('detection')
            from spandrel import canonicalize_state_dict
            state = canonicalize_state_dict(dict(source.state))
            return any(support.detect(state) for support in known)
        return False

    def load(self, source: Source, upscale: int) -> Found:
        from .spandrel_network import check_upscales, spandrel_registry
        descriptor = spandrel_registry().load(dict(source.state))
        check_upscales(descriptor)
        block = dict(
            type='Spandrel',
            architecture=descriptor.architecture.id,
            upscale=descriptor.scale,
            num_in_ch=descriptor.input_channels)
        return Found(block, {f'model.{key}': value for key, value in descriptor.model.state_dict().items()})
