from .cdnsr_model import CDNSRModel
from .etds_model import ETDSModel
from .pcsr_model import PCSRModel

__all__ = ['CDNSRModel', 'ETDSModel', 'PCSRModel']
