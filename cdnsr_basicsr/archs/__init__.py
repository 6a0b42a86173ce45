from basicsr.utils.registry import ARCH_REGISTRY
from ..registration import beside_others

with beside_others(ARCH_REGISTRY, upstream=True):
    from .carn_arch import CARN_M
    from .cdnsr_arch import CDNSR, ErrorMap, ErrorPredictor, PatchClassifier, Routing
    from .etds_arch import ETDS
    from .fsrcnn_arch import FSRCNN
    from .interpolation_arch import Interpolation
    from .pcsr_arch import PCSR
    from .plain_conv_arch import PlainConvSR
    from .smfanet_arch import SMFANet
    from .span_arch import SPAN
    from .spanv2_arch import SPANV2

__all__ = [
    'CARN_M', 'CDNSR', 'ErrorMap', 'ErrorPredictor', 'ETDS', 'FSRCNN', 'Interpolation', 'PCSR', 'PatchClassifier',
    'PlainConvSR', 'Routing', 'SMFANet', 'SPAN', 'SPANV2'
]
