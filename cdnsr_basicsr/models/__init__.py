from .cdnsr_model import CDNSRModel
from .pcsr_model import PCSRModel

__all__ = ['CDNSRModel', 'PCSRModel']
