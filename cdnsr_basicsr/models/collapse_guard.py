import math
import torch
from torch.nn.functional import one_hot

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info
from ..losses.routing_loss import batch_mean
from .cdnsr_options import CDNSRTraining

MAX_RAISES = 10


class CollapseGuard:
    """Detects that the classifier sends nearly all patches to one class, and can raise the average loss to counter
    that.

    Every `num_iter` iterations it looks at the classes of all patches since the last time. It costs no synchronisation
    with the device in between.

    Args:
        num_classes (int): Number of classes M.
        max_share (float): Share of one class that counts as collapsed, from 1 / M to 1. Default: that of
            train.collapse_share.
        num_iter (int): Number of iterations. Default: that of train.collapse_iter.
        average_loss (AverageLoss | None): Its weight is doubled at every look that finds a collapse, at most 10
            times. None: a warning says what to change. Default: None.
    """

    def __init__(self,
                 num_classes,
                 max_share=CDNSRTraining.collapse_share,
                 num_iter=CDNSRTraining.collapse_iter,
                 average_loss=None):
        self.max_share, self.num_iter, self.average_loss = max_share, num_iter, average_loss
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self.iterations = 0
        self.raises = 0

    def __call__(self, counts):
        """Looks at one iteration.

        Args:
            counts (Tensor): of shape (M, ), class_counts of the batch.
        """
        self.counts = self.counts.to(counts.device) + counts
        self.iterations += 1
        if self.iterations >= self.num_iter:
            self._judge()
            self.counts.zero_()
            self.iterations = 0

    def _judge(self):
        counts = self.counts.clone()
        if get_dist_info()[1] > 1:
            torch.distributed.all_reduce(counts)
        share, collapsed = (counts.double() / counts.sum()).max(dim=0)
        share, collapsed = share.item(), collapsed.item()
        if share <= self.max_share:
            return
        message = (f'Routing has collapsed: class {collapsed} took {100 * share:.1f} % of the patches of the last '
                   f'{self.num_iter} iterations. ')
        softer = 'set network_g.mixture to softmax, or warm up with train.label_opt.'
        if self.average_loss is None:
            hardest = collapsed == len(counts) - 1
            message += 'Raise train.average_opt.loss_weight (train.balance: auto does so), ' + (
                'raise' if hardest else 'lower') + f' the weight of train.flops_opt, {softer}'
        elif self.raises < MAX_RAISES:
            self.average_loss.loss_weight *= 2
            self.raises += 1
            message += f'The weight of the average loss is raised to {self.average_loss.loss_weight:g}.'
        else:
            message += f'The weight of the average loss stays at {self.average_loss.loss_weight:g}: {softer}'
        get_root_logger().warning(message)

    def state_dict(self):
        """What has been counted and changed so far, as plain values."""
        return {'counts': self.counts.tolist(), 'iterations': self.iterations, 'raises': self.raises}

    def load_state_dict(self, state):
        """Goes on from a state_dict; the weight of the average loss is raised from the configured one again.

        Args:
            state (dict): Content of a state_dict.
        """
        self.counts = torch.tensor(state['counts'], dtype=torch.int64)
        self.iterations, self.raises = state['iterations'], state['raises']
        if self.average_loss is not None:
            self.average_loss.loss_weight *= 2**self.raises


def class_counts(logits):
    """How many patches are routed to each class.

    Args:
        logits (Tensor): of shape (b, M).

    Returns:
        Tensor: of shape (M, ), int64.
    """
    # bincount would wait for the device to learn the largest class
    return one_hot(logits.detach().argmax(dim=1), logits.shape[1]).sum(dim=0)


def softened(logits):
    """Softmax at a temperature at which a collapsed classifier still gets a gradient from the average loss.

    Where one class is far ahead on the whole batch, its probability is 1 to the last bit, and no weight of a loss,
    however large, brings it back. The temperature is the lead of a class in the mean logits of the batch, and at least
    1: where the classes of a batch are balanced this is the plain softmax, however sure the classifier is of a patch.

    Args:
        logits (Tensor): of shape (b, M).

    Returns:
        Tensor: of shape (b, M), rows sum to 1.
    """
    mean = batch_mean(logits).detach()
    return torch.softmax(logits / (mean - mean.mean()).abs().max().clamp(min=1), dim=1)


def routing_entropy(logits):
    """Mean entropy of the classifier's softmax, relative to that of equal probabilities: from 0, certain, to 1.

    Args:
        logits (Tensor): of shape (b, M).

    Returns:
        Tensor: scalar.
    """
    log_p = torch.log_softmax(logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean() / math.log(logits.shape[1])
