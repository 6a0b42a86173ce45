from .routing_loss import AverageLoss, ClassLoss, FLOPsLoss

__all__ = ['AverageLoss', 'ClassLoss', 'FLOPsLoss']
