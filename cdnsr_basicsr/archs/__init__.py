from .carn_arch import CARN_M
from .cdnsr_arch import CDNSR, PatchClassifier, Routing
from .fsrcnn_arch import FSRCNN
from .interpolation_arch import Interpolation
from .pcsr_arch import PCSR

__all__ = ['CARN_M', 'CDNSR', 'FSRCNN', 'Interpolation', 'PCSR', 'PatchClassifier', 'Routing']
