import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.registry import LOSS_REGISTRY


def batch_mean(values):
    """Mean over the batch of all processes, which must have batches of one size.

    A loss that is not linear in the mean is another loss on each process's part of the batch. The gradient is that of
    this process's part, which DistributedDataParallel averages to the gradient of the whole.

    Args:
        values (Tensor): of shape (b, ...).

    Returns:
        Tensor: of shape (...).
    """
    mean = values.mean(dim=0)
    world_size = get_dist_info()[1]
    if world_size == 1:
        return mean
    total = mean.detach().clone()
    torch.distributed.all_reduce(total)
    return mean + (total / world_size - mean).detach()


def class_loss(weights):
    """mean_b[(M - 1) - sum_{i<j} |p_i - p_j|]: 0 for one-hot rows, M - 1 for uniform ones."""
    gaps = (weights.unsqueeze(2) - weights.unsqueeze(1)).abs().sum(dim=(1, 2)) / 2  # each pair is there twice
    return (weights.shape[1] - 1 - gaps).mean()


def average_loss(weights):
    """sum_i |sum_b p_i - B/M| / (2 (M - 1) B / M): 0 for equal shares, 1 when one class takes all.

    B is the batch of all processes.
    """
    num_classes = weights.shape[1]
    return (batch_mean(weights) - 1 / num_classes).abs().sum() * num_classes / (2 * (num_classes - 1))


def flops_loss(weights, costs, target):
    """relu(E - target) / range, with E = mean_b sum_i p_i c_i, costs relative to the most expensive branch.

    B is the batch of all processes. The published code divides by the range in absolute GFLOPs, so that its weight
    means something else for every backbone; here it is the relative range: published value = this value / c_max.
    """
    expected = batch_mean((weights * costs).sum(dim=1))
    return F.relu(expected - target) / (costs.max() - costs.min())


@LOSS_REGISTRY.register()
class ClassLoss(nn.Module):
    """Confidence loss: pushes every patch's mixture weights towards one class.

    Paper: ClassSR (CVPR 2021), equation 3, for any number of classes.

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
    """

    def __init__(self, loss_weight=1.0):
        super(ClassLoss, self).__init__()
        self.loss_weight = loss_weight

    def forward(self, weights):
        """
        Args:
            weights (Tensor): of shape (b, M), rows sum to 1.
        """
        return self.loss_weight * class_loss(weights)


@LOSS_REGISTRY.register()
class AverageLoss(nn.Module):
    """Balance loss: pushes the classes towards equal shares of the batch.

    Paper: ClassSR (CVPR 2021), equation 4, scaled to [0, 1] as in its code, for any number of classes.

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
    """

    def __init__(self, loss_weight=1.0):
        super(AverageLoss, self).__init__()
        self.loss_weight = loss_weight

    def forward(self, weights):
        """
        Args:
            weights (Tensor): of shape (b, M), rows sum to 1.
        """
        return self.loss_weight * average_loss(weights)


@LOSS_REGISTRY.register()
class FLOPsLoss(nn.Module):
    """Penalises an expected cost above a target.

    Paper: CDNSR (ICASSP 2023). 0 up to the target; (1 - target) / (1 - c_min) when all is hard.

    Args:
        target (float): Cost aimed at, as a fraction of the most expensive branch's. Default: 0.8.
        loss_weight (float): Loss weight. Default: 1.0.
    """

    def __init__(self, target=0.8, loss_weight=1.0):
        super(FLOPsLoss, self).__init__()
        if not 0 <= target <= 1:
            raise ValueError(f'FLOPsLoss: expected target in [0, 1], but got {target}.')
        self.target = target
        self.loss_weight = loss_weight

    def forward(self, weights, costs):
        """
        Args:
            weights (Tensor): of shape (b, M), rows sum to 1.
            costs (Tensor): of shape (M, ), cost of each branch relative to the most expensive, not all equal.
        """
        return self.loss_weight * flops_loss(weights, costs, self.target)


@LOSS_REGISTRY.register()
class LabelLoss(nn.Module):
    """Cross entropy between the classifier's logits and the patches' difficulty labels.

    Labels show the classifier what difficulty looks like before the other losses can: their gradient reaches it only
    through small differences between branches. For a warm-up the loss fades out.

    Args:
        loss_weight (float): Loss weight at the start. Default: 1.0.
        num_iter (int | None): The weight falls linearly to 0 in so many iterations. Default: None, it stays.
    """

    def __init__(self, loss_weight=1.0, num_iter=None):
        super(LabelLoss, self).__init__()
        if num_iter is not None and num_iter < 1:
            raise ValueError(f'LabelLoss: expected num_iter of at least 1, but got {num_iter}.')
        self.loss_weight = loss_weight
        self.num_iter = num_iter

    def weight_at(self, current_iter):
        """Loss weight at an iteration, the first being 1."""
        if self.num_iter is None:
            return self.loss_weight
        return self.loss_weight * max(0, 1 - (current_iter - 1) / self.num_iter)

    def forward(self, logits, labels, current_iter=1):
        """
        Args:
            logits (Tensor): of shape (b, M).
            labels (Tensor): of shape (b, ), int64, from 0 to M - 1.
            current_iter (int): Current iteration. Default: 1.
        """
        return self.weight_at(current_iter) * F.cross_entropy(logits, labels)


def squared_error(output, gt, cell=None):
    """Mean squared error of each patch in grey levels, 0 to 255, without gradient.

    Args:
        output (Tensor): of shape (b, c, h, w), about [0, 1].
        gt (Tensor): of the same shape.
        cell (int | None): Side of squares to take it of instead, whole ones from the top left. Default: None.

    Returns:
        Tensor: of shape (b, ), or (b, h // cell, w // cell).
    """
    error = (output.detach().float().clamp(0, 1) - gt).mul(255).square().mean(dim=1)
    return error.mean(dim=(1, 2)) if cell is None else F.avg_pool2d(error, cell)


@LOSS_REGISTRY.register()
class ErrorLoss(nn.Module):
    """Teaches a classifier that predicts errors (ErrorPredictor) what errors the branches make.

    The first branch's error is learnt by its gamma deviance, e / e' + log e', what the others save by the square of the
    difference in units of the first error (beyond `beta`, linear). Either is least where the prediction is the mean of
    what is to be expected, and weighs smooth and busy patches alike.

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
        gain_weight (float): Weight of what the other branches save. Default: 10.
        beta (float): Difference from which on it counts linearly. Default: 0.5.

    Attributes:
        rounding (float): Squared error that images of 8 bits have anyway; differences below it are none.
    """
    rounding = 1 / 12

    def __init__(self, loss_weight=1.0, gain_weight=10., beta=0.5):
        super(ErrorLoss, self).__init__()
        if not beta > 0:
            raise ValueError(f'ErrorLoss: expected beta above 0, but got {beta}.')
        self.loss_weight = loss_weight
        self.gain_weight = gain_weight
        self.beta = beta

    def forward(self, predicted, errors):
        """
        Args:
            predicted (Tensor): of shape (b, M) or (b, M, h, w), above 0 in the first column, in grey levels (0 to 255).
            errors (Tensor): of the same shape, mean squared error of each branch on each patch or cell.
        """
        first, unit = predicted[:, 0] + self.rounding, predicted[:, :1].detach() + self.rounding
        deviance = (errors[:, 0] + self.rounding) / first + first.log()
        loss = deviance.mean()
        if predicted.shape[1] > 1:
            saved = [(values[:, :1] - values[:, 1:]) / unit for values in (predicted, errors)]
            loss = loss + self.gain_weight * F.smooth_l1_loss(*saved, beta=self.beta)
        return self.loss_weight * loss
