from .carn_arch import CARN_M
from .cdnsr_arch import CDNSR, ErrorPredictor, PatchClassifier, Routing
from .etds_arch import ETDS
from .fsrcnn_arch import FSRCNN
from .interpolation_arch import Interpolation
from .pcsr_arch import PCSR
from .plain_conv_arch import PlainConvSR

__all__ = [
    'CARN_M', 'CDNSR', 'ErrorPredictor', 'ETDS', 'FSRCNN', 'Interpolation', 'PCSR', 'PatchClassifier', 'PlainConvSR',
    'Routing'
]
