from basicsr.utils.registry import MODEL_REGISTRY
from ..registration import beside_others

with beside_others(MODEL_REGISTRY):
    from .cdnsr_model import CDNSRModel
    from .etds_model import ETDSModel
    from .fast_realesrnet_model import FastRealESRNetModel
    from .fast_training import FastSRModel
    from .pcsr_model import PCSRModel

__all__ = ['CDNSRModel', 'ETDSModel', 'FastRealESRNetModel', 'FastSRModel', 'PCSRModel']
