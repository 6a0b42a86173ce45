from .cdnsr_model import CDNSRModel
from .etds_model import ETDSModel
from .fast_training import FastSRModel
from .pcsr_model import PCSRModel

__all__ = ['CDNSRModel', 'ETDSModel', 'FastSRModel', 'PCSRModel']
