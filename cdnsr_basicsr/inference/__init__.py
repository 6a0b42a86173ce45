from .engine import RoutedUpscaler, Upscaled
from .pixel_engine import PixelUpscaled, PixelUpscaler, default_patch_size, make_upscaler
from .tiling import Tiling

__all__ = [
    'PixelUpscaled', 'PixelUpscaler', 'RoutedUpscaler', 'Tiling', 'Upscaled', 'default_patch_size', 'make_upscaler'
]
