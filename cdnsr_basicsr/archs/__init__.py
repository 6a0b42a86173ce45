from .carn_arch import CARN_M
from .cdnsr_arch import CDNSR, PatchClassifier, Routing
from .etds_arch import ETDS
from .fsrcnn_arch import FSRCNN
from .interpolation_arch import Interpolation
from .plain_conv_arch import PlainConvSR

__all__ = ['CARN_M', 'CDNSR', 'ETDS', 'FSRCNN', 'Interpolation', 'PatchClassifier', 'PlainConvSR', 'Routing']
