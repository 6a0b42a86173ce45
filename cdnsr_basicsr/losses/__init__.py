from .contrastive_loss import ContrastLoss, CSDLoss
from .distill_loss import FeatureDistillLoss, KDL1Loss
from .feature_extractor import VGG19Features
from .routing_loss import AverageLoss, ClassLoss, FLOPsLoss, LabelLoss

__all__ = [
    'AverageLoss', 'ClassLoss', 'ContrastLoss', 'CSDLoss', 'FeatureDistillLoss', 'FLOPsLoss', 'KDL1Loss', 'LabelLoss',
    'VGG19Features'
]
