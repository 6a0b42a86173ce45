"""Difficulty-routed super-resolution as a BasicSR plugin."""
from . import _compat

__version__ = '0.1.0'

# BasicSR cannot be imported on current torchvision and Python without these; spawned data loader workers and other
# plugins import it before they ever call register(), so this cannot wait for it.
_compat.provide_missing_modules()


def register() -> None:
    """Enters this plugin's archs, losses, datasets and models into BasicSR's registries.

    This is the entry point of the group ``basicsr.plugins``. Calling it again does nothing.
    """
    _compat.patch_basicsr()
    from . import archs, data, losses, models  # noqa: F401
