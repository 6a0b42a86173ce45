from .cdnsr_model import CDNSRModel

__all__ = ['CDNSRModel']
