from basicsr.utils.registry import LOSS_REGISTRY
from ..registration import beside_others

with beside_others(LOSS_REGISTRY, upstream=True):
    from .contrastive_loss import ContrastLoss, CSDLoss
    from .distill_loss import FeatureDistillLoss, KDL1Loss
    from .feature_extractor import VGG19Features
    from .routing_loss import AverageLoss, ClassLoss, ErrorLoss, FLOPsLoss, LabelLoss, squared_error

__all__ = [
    'AverageLoss', 'ClassLoss', 'ContrastLoss', 'CSDLoss', 'ErrorLoss', 'FeatureDistillLoss', 'FLOPsLoss', 'KDL1Loss',
    'LabelLoss', 'squared_error', 'VGG19Features'
]
