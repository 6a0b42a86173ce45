import contextlib
import copy
import math
import torch
from torch import nn as nn
from torch.nn import functional as F
from typing import NamedTuple, Optional, Tuple

from basicsr.utils.registry import ARCH_REGISTRY


class Routing(NamedTuple):
    """CDNSR's decisions for a batch of patches.

    Attributes:
        logits (Tensor): of shape (b, M). Output of the classifier.
        weights (Tensor): of shape (b, M), rows sum to 1. Mixture weights in training, one-hot in evaluation.
        branch_outputs (tuple[Tensor] | None): M of shape (b, c, h*upscale, w*upscale). None where the branches were
            not asked for, and in evaluation, where each patch goes through one branch only.
    """
    logits: torch.Tensor
    weights: torch.Tensor
    branch_outputs: Optional[Tuple[torch.Tensor, ...]]


class _Mixture(torch.autograd.Function):
    """sum_i p_i * branch_i. Output and gradients take one pass over each branch's images, without products between."""

    @staticmethod
    def forward(ctx, weights, *images):
        ctx.save_for_backward(weights, *images)
        output = images[0] * weights[:, 0, None, None, None]
        for i, image in enumerate(images[1:], 1):
            output.addcmul_(image.to(output.dtype), weights[:, i, None, None, None])
        return output

    @staticmethod
    def backward(ctx, grad):
        weights, *images = ctx.saved_tensors
        grad_weights, grad_images = None, [None] * len(images)
        if ctx.needs_input_grad[0]:
            # channels last, as the images mostly lie: nothing is copied
            flat = [tensor.to(grad.dtype).movedim(1, -1).flatten(1) for tensor in (grad, *images)]
            grad_weights = torch.stack([torch.linalg.vecdot(flat[0], image) for image in flat[1:]], dim=1)
        for i, image in enumerate(images):
            if ctx.needs_input_grad[1 + i]:
                grad_images[i] = (grad * weights[:, i, None, None, None]).to(image.dtype)
        return (grad_weights, *grad_images)


def gumbel_softmax(logits, tau, uniform=None):
    """Differentiable sample of a class: softmax((logits + g) / tau) with g = -log(-log(u)).

    Paper: Categorical Reparameterization with Gumbel-Softmax (ICLR 2017).

    Args:
        logits (Tensor): of shape (b, M).
        tau (float): Temperature; the smaller, the closer to one-hot.
        uniform (Tensor | None): of shape (b, M), noise in [0, 1). Drawn if None. Default: None.

    Returns:
        Tensor: of shape (b, M), rows sum to 1.
    """
    if uniform is None:
        uniform = torch.rand_like(logits)
    gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    return F.softmax((logits + gumbel) / tau, dim=1)


def build_part(opt):
    """Builds a network of its option block, as build_network does, which no arch can import: it imports all archs.

    Args:
        opt (dict): Arguments, and the arch's name as type.

    Returns:
        nn.Module: The network.
    """
    opt = copy.deepcopy(opt)
    return ARCH_REGISTRY.get(opt.pop('type'))(**opt)


@torch.no_grad()
def start_with_texture(conv):
    """Makes the filters of a classifier's first layer see texture instead of brightness.

    Difficulty is in the small differences between neighbouring pixels. With filters of mean zero, large enough for the
    activation to bend, it reaches the later layers at once; otherwise the patch's colour covers it for long.

    Args:
        conv (nn.Conv2d): First layer, as it was initialised.
    """
    conv.weight.sub_(conv.weight.mean(dim=(2, 3), keepdim=True)).mul_(4)


@ARCH_REGISTRY.register()
class PatchClassifier(nn.Module):
    """Says how hard a patch is: one logit per class, class 0 being the easiest.

    Paper: ClassSR: A General Framework to Accelerate Super-Resolution Networks by Data Characteristic (CVPR 2021).

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_feat (int): Channel number of intermediate features. Default: 128.
        num_classes (int): Number of classes M. CDNSR sets it to its number of branches. Default: 3.
    """

    def __init__(self, num_in_ch=3, num_feat=128, num_classes=3):
        super(PatchClassifier, self).__init__()
        layers = [nn.Conv2d(num_in_ch, num_feat, 4, stride=4)]
        layers += [nn.Conv2d(num_feat, num_feat, 1) for _ in range(3)]
        layers += [nn.Conv2d(num_feat, 32, 1)]
        self.convs = nn.ModuleList(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, num_classes)
        start_with_texture(self.convs[0])

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1]. Patches below 4x4 are padded.

        Returns:
            Tensor: of shape (b, M), logits.
        """
        h, w = x.shape[-2:]
        if h < 4 or w < 4:
            x = F.pad(x, (0, max(0, 4 - w), 0, max(0, 4 - h)), mode='replicate')
        for conv in self.convs[:-1]:
            x = F.leaky_relu(conv(x), negative_slope=0.1, inplace=True)
        return self.fc(self.pool(self.convs[-1](x)).flatten(1))


class _PredictsErrors(nn.Module):
    """Base of classifiers that predict errors: converts errors to logits, and back."""

    def __init__(self, num_classes, price):
        super(_PredictsErrors, self).__init__()
        if not price > 0:
            raise ValueError(f'{type(self).__name__}: expected a price above 0, but got {price}.')
        self.price = price
        self.register_buffer('costs', torch.zeros(num_classes))

    def logits(self, errors):
        """The predicted squared errors by which a class is chosen, of shape (b, M)."""
        return -(errors / self.price + self.costs)

    def errors(self, logits):
        """The predicted squared errors, in grey levels, that logits stand for.

        Args:
            logits (Tensor): of shape (b, M).

        Returns:
            Tensor: of shape (b, M).
        """
        return -self.price * (logits + self.costs)


@ARCH_REGISTRY.register()
class ErrorPredictor(_PredictsErrors):
    """Predicts the squared error that each branch would leave in a patch; in the place of PatchClassifier.

    Its logits are -(error_i / price + cost_i), so that the most probable class is the branch with the least
    error + price * cost, and any budget a Lagrangian choice between predicted errors. Errors are predicted for every
    8x8 pixels and averaged: what is learnt on small patches holds for larger tiles. It learns from errors alone
    (ErrorLoss): CDNSR's mixture has no gradient to it.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_feat (int): Channel number of the first intermediate features, which grow to three times that. Default: 16.
        num_classes (int): Number of branches M. CDNSR sets it. Default: 3.
        price (float): Squared error, in grey levels (0 to 255), that the most expensive branch has to save to be worth
            its cost, without a budget. Default: 2.

    Attributes:
        costs (Tensor): Buffer of shape (M, ), cost of each branch relative to the most expensive; the model sets it.
    """

    def __init__(self, num_in_ch=3, num_feat=16, num_classes=3, price=2.):
        super(ErrorPredictor, self).__init__(num_classes, price)
        widths = (num_in_ch, num_feat, 2 * num_feat, 3 * num_feat, 3 * num_feat)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 3 else 1, padding=1) for i in range(4))
        self.hidden = nn.Conv2d(widths[-1], widths[-1], 1)
        self.head = nn.Conv2d(widths[-1], num_classes, 1)
        start_with_texture(self.convs[0])

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, M), logits.
        """
        for conv in (*self.convs, self.hidden):
            x = F.leaky_relu(conv(x), negative_slope=0.1, inplace=True)
        x = self.head(x)
        # the first branch's error by its logarithm, for it spans four orders of magnitude; what the others save by
        # its fraction of that, which is small and may be negative
        first = torch.exp(x[:, :1].clamp(-8, 10))
        return self.logits(torch.cat([first, first * (1 - x[:, 1:])], dim=1).mean(dim=(2, 3)))


def cosines(size=4):
    """Patterns of a square: the filters of its discrete cosine transform but the constant one.

    Args:
        size (int): Side of the square. Default: 4.

    Returns:
        Tensor: of shape (size*size - 1, size, size), orthonormal, each of mean zero.
    """
    order = torch.arange(size, dtype=torch.float32)
    waves = torch.cos(math.pi * order[:, None] * (order + 0.5) / size) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return (waves[:, None, :, None] * waves[None, :, None, :]).flatten(0, 1)[1:]


@ARCH_REGISTRY.register()
class ErrorMap(_PredictsErrors):
    """Predicts the squared error that each branch would leave, for every 8x8 pixels of an image.

    What a network gets wrong is texture. How much there is, and of which kind, say the energies of the luma's patterns:
    of the coefficients of a cosine transform of overlapping 4x4 squares. They are fixed, blind to brightness and the
    same for a mirrored image, so that little is left to be learnt by heart; two 3x3 convs over their logarithms make
    errors of them. All but the transform runs at an eighth of the resolution.

    In the place of PatchClassifier it is asked for the mean of its map: its logits are -(error_i / price + cost_i), so
    that the most probable class is the branch with the least error + price * cost. It learns from errors alone
    (ErrorLoss): CDNSR's mixture has no gradient to it.

    Args:
        num_in_ch (int): Channel number of inputs, 3 (RGB) or 1. Default: 3.
        num_feat (int): Channel number of intermediate features. Default: 48.
        num_classes (int): Number of branches M. CDNSR sets it. Default: 3.
        price (float): Squared error, in grey levels (0 to 255), that the most expensive branch has to save to be worth
            its cost, without a budget. Default: 2.
        margin (float): Loss of PSNR by routing, relative to the predicted one, as it was measured on photographs that
            were not learnt from; of errors relative to the hardest branch's image, those themselves. Default: 1.
        reference (str): 'gt' | 'hardest': what errors are relative to: the ground truth, or the image of the last
            branch, whose own error is zero then. Default: 'gt'.

    Attributes:
        costs (Tensor): Buffer of shape (M, ), cost of each branch relative to the most expensive; the model sets it.
        cell (int): Side of what has an error of its own, in pixels.
        reach (int): How far beyond a cell it looks, in pixels, rounded up to cells.
    """
    cell = 8
    reach = 24

    def __init__(self, num_in_ch=3, num_feat=48, num_classes=3, price=2., margin=1., reference='gt'):
        super(ErrorMap, self).__init__(num_classes, price)
        if not margin > 0:
            raise ValueError(f'ErrorMap: expected a margin above 0, but got {margin}.')
        if reference not in ('gt', 'hardest'):
            raise ValueError(f"ErrorMap: expected reference 'gt' or 'hardest', but got {reference!r}.")
        self.margin, self.reference = margin, reference
        luma = torch.tensor([0.299, 0.587, 0.114] if num_in_ch == 3 else [1 / num_in_ch] * num_in_ch)
        filters = 255 * cosines()[:, None] * luma.view(1, -1, 1, 1)
        self.register_buffer('filters', filters, persistent=False)
        self.convs = nn.ModuleList(
            [nn.Conv2d(len(filters), num_feat, 3, padding=1),
             nn.Conv2d(num_feat, num_feat, 3, padding=1)])
        self.head = nn.Conv2d(num_feat, num_classes - (reference == 'hardest'), 1)
        with torch.no_grad():  # starts with the energy itself
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()

    def energies(self, x):
        """Logarithms of the mean square of each pattern in each cell.

        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, 15, ceil(h / 8), ceil(w / 8)).
        """
        h, w = x.shape[-2:]
        x = F.pad(x, (1, 1 + -w % self.cell, 1, 1 + -h % self.cell), mode='replicate')
        x = F.conv2d(x, self.filters, stride=2)
        return F.avg_pool2d(x.square(), self.cell // 2).add(0.1).log()  # 0.1: what rounding to 8 bits leaves

    def errors_of(self, energies):
        """Errors by energies.

        Args:
            energies (Tensor): of shape (b, 15, h, w).

        Returns:
            Tensor: of shape (b, M, h, w), squared errors in grey levels.
        """
        level = energies.mean(dim=1, keepdim=True)
        # about the mean and the deviation of photographs, so that the zeros beyond the border are nothing unusual
        x = energies.sub(2.5).div(2.5)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), negative_slope=0.1)
        x = self.head(x)
        # the first branch's error by its logarithm, relative to the energy; of the others the fraction that they save
        first = torch.exp((level + 1 + x[:, :1]).clamp(-6, 10))
        errors = [first, first * (1 - x[:, 1:])]
        if self.reference == 'hardest':
            errors.append(torch.zeros_like(first))
        return torch.cat(errors, dim=1)

    def error_map(self, x):
        """Errors of the cells of an image.

        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, M, ceil(h / 8), ceil(w / 8)), squared errors in grey levels.
        """
        return self.errors_of(self.energies(x))

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, M), logits.
        """
        return self.logits(self.error_map(x).mean(dim=(2, 3)))


@ARCH_REGISTRY.register()
class CDNSR(nn.Module):
    """Classification-based dynamic network: a patch classifier and M branches of growing capacity.

    Paper: Classification-Based Dynamic Network for Efficient Super-Resolution (ICASSP 2023).

    In training every branch runs on the whole batch and the output is the mixture sum_i p_i * branch_i. In evaluation
    every patch goes through the branch of its most probable class. Either way there is one pass per branch.

    Args:
        branches (list[dict]): Option blocks of 2 to 5 registered archs, the cheapest first.
        classifier (dict): Option block of a registered classifier, for instance PatchClassifier; its num_classes is
            set to the number of branches.
        upscale (int): Upsampling factor of all branches. Default: 4.
        mixture (str): 'gumbel' (CDNSR) | 'softmax' (ClassSR): mixture weights in training. Default: 'gumbel'.

    Attributes:
        tau (float): Temperature of the Gumbel mixture; the model anneals it.
    """

    def __init__(self, branches, classifier, upscale=4, mixture='gumbel'):
        super(CDNSR, self).__init__()
        if not 2 <= len(branches) <= 5:
            raise ValueError(f'CDNSR: expected 2 to 5 branches, but got {len(branches)}.')
        if mixture not in ('gumbel', 'softmax'):
            raise ValueError(f"CDNSR: expected mixture 'gumbel' or 'softmax', but got {mixture!r}.")
        classifier = dict(classifier)
        num_classes = classifier.setdefault('num_classes', len(branches))
        if num_classes != len(branches):
            raise ValueError(f'CDNSR: the classifier has {num_classes} classes for {len(branches)} branches.')
        self.upscale = upscale
        self.mixture = mixture
        self.tau = 1.0
        self.frozen = ()
        self.classifier = build_part(classifier)
        self.branches = nn.ModuleList([build_part(branch) for branch in branches])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f'{prefix}network_g', None)  # a file's description of the network, no weight
        super(CDNSR, self)._load_from_state_dict(state_dict, prefix, *args)

    def freeze(self, parts):
        """Freezes parts of the network: no gradient, no graph, evaluation mode also in training.

        Args:
            parts (list[str]): Any of 'classifier' and 'branches'.
        """
        for part in parts:
            if part not in ('classifier', 'branches'):
                raise ValueError(f"CDNSR.freeze: expected 'classifier' or 'branches', but got {part!r}.")
        self.frozen = tuple(parts)
        for part in parts:
            getattr(self, part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super(CDNSR, self).train(mode)
        for part in self.frozen:
            getattr(self, part).eval()
        return self

    def _graph_of(self, part):
        return torch.no_grad() if part in self.frozen else contextlib.nullcontext()

    def forward(self, x, return_routing=False, run_branches=True):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1]. Patches of one size.
            return_routing (bool): Whether to return the routing too. Default: False.
            run_branches (bool): Whether to run the branches in training; without, there is no output but the routing.
                Default: True.

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1]; or a tuple of it and a Routing.
        """
        with self._graph_of('classifier'):
            logits = self.classifier(x)
        output, routing = self._mix(x, logits, run_branches) if self.training else self._route(x, logits)
        return (output, routing) if return_routing else output

    def _mix(self, x, logits, run_branches):
        # noise and softmax need the precision, also under autocast
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # predicted errors are learnt from errors; a loss on the mixture would make them something else
        scores = logits.detach() if hasattr(self.classifier, 'errors') else logits
        weights = gumbel_softmax(scores, self.tau) if self.mixture == 'gumbel' else F.softmax(scores, dim=1)
        if not run_branches:
            return None, Routing(logits, weights, None)
        with self._graph_of('branches'):
            branch_outputs = tuple(branch(x) for branch in self.branches)
        output = _Mixture.apply(weights, *branch_outputs)
        return output, Routing(logits, weights, branch_outputs)

    def _route(self, x, logits):
        classes = logits.argmax(dim=1)
        output = None
        for i, branch in enumerate(self.branches):
            index = (classes == i).nonzero().squeeze(1)
            if index.numel() == 0:
                continue
            routed = branch(x[index])
            if output is None:
                output = routed.new_empty(x.shape[0], *routed.shape[1:])
            output[index] = routed
        weights = F.one_hot(classes, len(self.branches)).type_as(logits)
        return output, Routing(logits, weights, None)
