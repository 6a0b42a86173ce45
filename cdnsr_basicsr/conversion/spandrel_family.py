"""Checkpoints of the community, in every architecture for super-resolution that spandrel knows."""
from __future__ import annotations

import contextlib

from .registry import Family, Found, Source, register


@register
class SpandrelFamily(Family):
    """What spandrel reads: SwinIR, HAT, DAT, RCAN, ESRGAN, Real-ESRGAN, PLKSR, OmniSR ..."""
    names = ('spandrel', )
    projects = 'networks that spandrel reads'
    files = 'all of theirs, with the extra `spandrel`'
    order = 9  # where no other family knows better

    def detect(self, source: Source) -> bool:
        with contextlib.suppress(ImportError):
            return self._architecture(source) is not None
        return False

    def load(self, source: Source, upscale: int) -> Found:
        from ..archs.spandrel_arch import check_upscales
        descriptor = self._architecture(source).load(self._state(source))
        check_upscales(descriptor)
        block = dict(
            type='Spandrel',
            architecture=descriptor.architecture.id,
            upscale=descriptor.scale,
            num_in_ch=descriptor.input_channels)
        return Found(block, {f'model.{key}': value for key, value in descriptor.model.state_dict().items()})

    @staticmethod
    def _state(source: Source):  # type: ignore[no-untyped-def]
        from spandrel import canonicalize_state_dict
        return canonicalize_state_dict(dict(source.state))

    def _architecture(self, source: Source):  # type: ignore[no-untyped-def]
        """The architecture in spandrel, None if none is that of the weights."""
        from ..archs.spandrel_arch import spandrel_registry
        registry, state = spandrel_registry(), self._state(source)
        found = (known for known in registry.architectures('detection') if known.detect(state))
        known = next(found, None)
        return None if known is None else known.architecture
