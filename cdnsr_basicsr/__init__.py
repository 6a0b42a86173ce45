"""Difficulty-routed super-resolution as a BasicSR plugin.

>>> import cdnsr_basicsr as sr
>>> upscaler = sr.load('cdnsr-modern-x4', budget=0.5)
>>> upscaler.upscale('photo.jpg').image  # doctest: +SKIP
"""
from importlib import metadata
from typing import TYPE_CHECKING, Any

from . import _compat
from .options import OptionError

__version__ = '0.2.0'

# BasicSR cannot be imported on current torchvision and Python without these; spawned data loader workers and other
# plugins import it before they ever call register(), so this cannot wait for it.
_compat.provide_missing_modules()


def register() -> None:
    """Enters this plugin's archs, losses, datasets and models into BasicSR's registries.

    This is the entry point of the group ``basicsr.plugins``. Calling it again does nothing.
    """
    _compat.patch_basicsr()
    from basicsr.utils.registry import ARCH_REGISTRY
    from . import archs, data, losses, models  # noqa: F401
    from .registration import beside_others
    with beside_others(ARCH_REGISTRY):
        from .conversion import spandrel_network  # noqa: F401


def plugins() -> list[metadata.EntryPoint]:
    """The plugins in the entry-point group `basicsr.plugins`, this one last, which yields names."""
    points = metadata.entry_points()
    # Python 3.9 returns a dict of groups
    group = points.select(group='basicsr.plugins') if hasattr(points, 'select') else points.get('basicsr.plugins', ())
    return sorted(group, key=lambda point: point.value.startswith(f'{__name__}:'))


def load_plugins() -> None:
    """Registers all other plugins, then this one, also where it is not installed."""
    _compat.patch_basicsr()
    for point in plugins():
        if point.value.startswith(f'{__name__}:'):
            continue
        try:
            point.load()()
        except Exception as error:
            raise OptionError(f'plugin {point.name} ({point.value})', f'cannot be loaded: {error!r}') from error
    register()


if TYPE_CHECKING:
    from .loading import load as load
else:

    def __getattr__(name: str) -> Any:
        if name != 'load':  # torch and BasicSR are imported when they are needed
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        from .loading import load
        return load
