from .cdnsr_model import CDNSRModel
from .etds_model import ETDSModel

__all__ = ['CDNSRModel', 'ETDSModel']
