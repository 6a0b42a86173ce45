import itertools
from torch import nn as nn

from basicsr.utils.registry import LOSS_REGISTRY


def distill_pairs(num_branches, external):
    """Who learns from whom.

    Args:
        num_branches (int): Number of branches M, the cheapest first.
        external (bool): Whether there is a teacher besides the branches; it counts as number M.

    Returns:
        list[tuple]: (student, teacher): each branch with the external teacher, or with all more expensive branches.
    """
    if external:
        return [(i, num_branches) for i in range(num_branches)]
    return list(itertools.combinations(range(num_branches), 2))


def kd_l1_loss(outputs, weights, teacher=None):
    """sum over pairs of p_i * mean|student_i - teacher_j|, the teacher detached: 0 where all branches agree.

    Args:
        outputs (tuple[Tensor]): M of shape (b, c, h, w), the cheapest branch first.
        weights (Tensor): of shape (b, M), rows sum to 1.
        teacher (Tensor | None): of shape (b, c, h, w), output of an external teacher. Default: None.

    Returns:
        Tensor: of shape (b, ).
    """
    images = [*outputs] if teacher is None else [*outputs, teacher]
    return sum(weights[:, i] * (images[i] - images[j].detach()).abs().mean(dim=(1, 2, 3))
               for i, j in distill_pairs(len(outputs), teacher is not None))


@LOSS_REGISTRY.register()
class KDL1Loss(nn.Module):
    """Knowledge distillation on images: L1 of each branch to all more expensive ones, or to an external teacher.

    Paper: CDNSR (ICASSP 2023).

    Each student is pulled most on the patches that are its own: its loss is weighted by its mixture weight. It teaches
    the students alone, neither the teachers nor the classifier, which could lower it by routing around the students.

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
        reduction (str): 'mean' | 'sum' over the patches; the published code sums. Default: 'mean'.
    """

    def __init__(self, loss_weight=1.0, reduction='mean'):
        super(KDL1Loss, self).__init__()
        if reduction not in ('mean', 'sum'):
            raise ValueError(f"KDL1Loss: expected reduction 'mean' or 'sum', but got {reduction!r}.")
        self.loss_weight = loss_weight
        self.reduction = reduction

    def forward(self, outputs, weights, teacher=None):
        """
        Args:
            outputs (tuple[Tensor]): M of shape (b, c, h, w), the cheapest branch first.
            weights (Tensor): of shape (b, M), rows sum to 1.
            teacher (Tensor | None): of shape (b, c, h, w), output of an external teacher. Default: None.
        """
        loss = kd_l1_loss(outputs, weights.detach(), teacher)
        return self.loss_weight * (loss.mean() if self.reduction == 'mean' else loss.sum())


@LOSS_REGISTRY.register()
class FeatureDistillLoss(nn.Module):
    """Knowledge distillation on feature maps: as KDL1Loss, between features of a pre-trained network.

    Paper: CDNSR (ICASSP 2023), its perceptual loss, between all pairs of branches.

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
        layer_weights (dict | None): Weight per layer of VGG19. Default: None, {'conv5_4': 1}.

    Attributes:
        layers (list[str]): Layers whose features are needed.
    """

    def __init__(self, loss_weight=1.0, layer_weights=None):
        super(FeatureDistillLoss, self).__init__()
        self.loss_weight = loss_weight
        self.layer_weights = dict(layer_weights or {'conv5_4': 1})
        self.layers = list(self.layer_weights)

    def forward(self, students, teacher, weights):
        """
        Args:
            students (list[dict]): Features (b, c, h, w) by layer of each student, the cheapest branch first.
            teacher (dict): Features of the teacher: the most expensive branch, or an external network if all M branches
                are students.
            weights (Tensor): of shape (b, M), rows sum to 1.
        """
        features, num_branches = [*students, teacher], weights.shape[1]
        loss = 0
        for i, j in distill_pairs(num_branches, external=len(students) == num_branches):
            distance = sum(layer_weight * (features[i][layer] - features[j][layer].detach()).abs().mean(dim=(1, 2, 3))
                           for layer, layer_weight in self.layer_weights.items())
            loss = loss + weights[:, i].detach() * distance
        return self.loss_weight * loss.mean()
