from .engine import RoutedUpscaler, Upscaled
from .pixel_engine import PixelUpscaled, PixelUpscaler, make_upscaler
from .tiling import Tiling

__all__ = ['PixelUpscaled', 'PixelUpscaler', 'RoutedUpscaler', 'Tiling', 'Upscaled', 'make_upscaler']
