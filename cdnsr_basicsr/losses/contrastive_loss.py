import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import LOSS_REGISTRY

# channels of VGG19's layers, by the number of their block
VGG_CHANNELS = {'1': 64, '2': 128, '3': 256, '4': 512, '5': 512}


def draw_others(batch, num, device=None):
    """Draws for every sample of a batch different other ones at random.

    Args:
        batch (int): Number of samples b, at least 2.
        num (int): How many others are wanted.
        device (torch.device | None): Where the result is. Default: None.

    Returns:
        Tensor: of shape (b, min(num, b - 1)), int64.
    """
    if batch < 2:
        raise ValueError('Contrastive losses take negatives from the other samples of a batch: at least 2 are needed.')
    order = torch.rand(batch, batch, device=device).fill_diagonal_(2).argsort(dim=1)
    return order[:, :min(num, batch - 1)]


def csd_loss(student, teacher, negatives, others, layer_weights, reduction='mean'):
    """sum_l w_l * L1(teacher_l, student_l) / (sum over negatives of L1(student_l, negative_l) + 1e-7).

    0 where student and teacher agree.

    Args:
        student (dict): Features (b, c, h, w) by layer.
        teacher (dict): The same of the teacher.
        negatives (dict): Features (n, c, h, w) by layer, to choose from.
        others (Tensor): of shape (b, K), which of them are whose negatives.
        layer_weights (dict): Weight per layer.
        reduction (str): 'mean' | 'batch'. With 'batch' the distances are averaged over the batch before they are
            divided, as in the published code. Default: 'mean'.

    Returns:
        Tensor: scalar.
    """
    loss = 0
    for layer, layer_weight in layer_weights.items():
        positive = (teacher[layer].detach() - student[layer]).abs().mean(dim=(1, 2, 3))
        # one negative of every sample at a time: all at once would take K times the memory
        negative = sum((student[layer] - negatives[layer][index]).abs().mean(dim=(1, 2, 3)) for index in others.T)
        if reduction == 'batch':
            positive, negative = positive.mean(), negative.mean()
        loss = loss + layer_weight * (positive / (negative + 1e-7)).mean()
    return loss


def contrast_loss(student, teacher, negatives, temperature):
    """-log(exp(d_st / T) / (exp(d_st / T) + sum_k exp(d_sk / T))) per sample, d being cosine similarities.

    Goes to 0 as the student nears the teacher and leaves the negatives behind; log(K + 1) where all are the same.

    Args:
        student (Tensor): of shape (b, d), embeddings.
        teacher (Tensor): of shape (b, d).
        negatives (Tensor): of shape (b, K, d).
        temperature (float): Temperature T.

    Returns:
        Tensor: of shape (b, ).
    """
    others = torch.cat([teacher.unsqueeze(1), negatives], dim=1)
    similarity = F.cosine_similarity(student.unsqueeze(1), others, dim=2)
    return -F.log_softmax(similarity / temperature, dim=1)[:, 0]


@LOSS_REGISTRY.register()
class CSDLoss(nn.Module):
    """Contrastive self-distillation on feature maps: towards the teacher, away from blurred other images.

    Paper: Towards Compact Single Image Super-Resolution via Contrastive Self-distillation (IJCAI 2021), as used in
    CDNSR (ICASSP 2023).

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
        layer_weights (dict | None): Weight per layer of VGG19. Default: None, 1/32, 1/16, 1/8, 1/4 and 1 for relu1_1
            to relu5_1.
        num_negatives (int): Negatives of a sample: bicubic-upsampled LQ images of other samples. Default: 4.
        reduction (str): 'mean' | 'batch', see csd_loss. Default: 'mean'.

    Attributes:
        layers (list[str]): Layers whose features are needed.
    """

    def __init__(self, loss_weight=1.0, layer_weights=None, num_negatives=4, reduction='mean'):
        super(CSDLoss, self).__init__()
        if reduction not in ('mean', 'batch'):
            raise ValueError(f"CSDLoss: expected reduction 'mean' or 'batch', but got {reduction!r}.")
        if num_negatives < 1:
            raise ValueError(f'CSDLoss: expected num_negatives of at least 1, but got {num_negatives}.')
        self.loss_weight = loss_weight
        self.layer_weights = dict(layer_weights or {
            'relu1_1': 1 / 32,
            'relu2_1': 1 / 16,
            'relu3_1': 1 / 8,
            'relu4_1': 1 / 4,
            'relu5_1': 1
        })
        self.layers = list(self.layer_weights)
        self.num_negatives = num_negatives
        self.reduction = reduction

    def forward(self, students, teacher, negatives):
        """
        Args:
            students (list[dict]): Features (b, c, h, w) by layer of each student.
            teacher (dict): Those of the teacher.
            negatives (dict): Those of the bicubic-upsampled LQ images, in the same order.
        """
        first = teacher[self.layers[0]]
        others = draw_others(first.shape[0], self.num_negatives, first.device)
        losses = [
            csd_loss(student, teacher, negatives, others, self.layer_weights, self.reduction) for student in students
        ]
        return self.loss_weight * sum(losses)


@LOSS_REGISTRY.register()
class ContrastLoss(nn.Module):
    """Contrast of embeddings: each student's near the teacher's, far from those of blurred other images.

    Paper: CDNSR (ICASSP 2023), CS loss. The published code computes it across the batch, where it is 0 with gradient
    0; here it is computed per sample, with the form of InfoNCE (Representation Learning with Contrastive Predictive
    Coding, 2018).

    Args:
        loss_weight (float): Loss weight. Default: 1.0.
        layer (str): Layer of VGG19 that is pooled. Default: 'relu5_1'.
        num_dim (int): Width of the projection head and of the embedding. Default: 512.
        num_negatives (int): Negatives of a sample: bicubic-upsampled LQ images of other samples. Default: 4.
        temperature (float): Temperature of the similarities. Default: 0.1.

    Attributes:
        layers (list[str]): Layers whose features are needed.
        head (nn.Module): Projection head, to be optimised with the network and not needed afterwards.
    """

    def __init__(self, loss_weight=1.0, layer='relu5_1', num_dim=512, num_negatives=4, temperature=0.1):
        super(ContrastLoss, self).__init__()
        if num_negatives < 1:
            raise ValueError(f'ContrastLoss: expected num_negatives of at least 1, but got {num_negatives}.')
        if temperature <= 0:
            raise ValueError(f'ContrastLoss: expected a temperature above 0, but got {temperature}.')
        if layer[4:5] not in VGG_CHANNELS:
            raise ValueError(f"ContrastLoss: expected a layer of VGG19 such as 'relu5_1', but got {layer!r}.")
        self.loss_weight = loss_weight
        self.layers = [layer]
        self.num_negatives = num_negatives
        self.temperature = temperature
        num_in_ch = VGG_CHANNELS[layer[4]]
        self.head = nn.Sequential(nn.Linear(num_in_ch, num_dim), nn.ReLU(inplace=True), nn.Linear(num_dim, num_dim))

    def embed(self, features):
        """Embedding of an image.

        Args:
            features (dict): Features (b, c, h, w) by layer.

        Returns:
            Tensor: of shape (b, num_dim).
        """
        return self.head(features[self.layers[0]].float().mean(dim=(2, 3)))

    def forward(self, students, teacher, negatives):
        """
        Args:
            students (list[dict]): Features (b, c, h, w) by layer of each student.
            teacher (dict): Those of the teacher.
            negatives (dict): Those of the bicubic-upsampled LQ images, in the same order.
        """
        teacher, negatives = self.embed({key: value.detach() for key, value in teacher.items()}), self.embed(negatives)
        negatives = negatives[draw_others(len(teacher), self.num_negatives, teacher.device)]
        losses = [contrast_loss(self.embed(student), teacher, negatives, self.temperature) for student in students]
        return self.loss_weight * sum(losses).mean()
