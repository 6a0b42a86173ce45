from .engine import RoutedUpscaler, Upscaled
from .tiling import Tiling

__all__ = ['RoutedUpscaler', 'Tiling', 'Upscaled']
