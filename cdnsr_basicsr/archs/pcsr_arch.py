import copy
import math
import torch
from torch import nn as nn
from torch.nn import functional as F
from typing import NamedTuple

from basicsr.utils.registry import ARCH_REGISTRY

SAMPLED_TOGETHER = {'cpu': 2**13, 'cuda': 2**18}  # pixels: on a CPU the activations stay in the cache
ROUNDED_TO = 2**10  # pixels, in half precision
BAND_PIXELS = {'cpu': 2**17, 'cuda': 2**22}  # of the result that are computed together: bounds the memory
COUNTED_SIZE = 16  # side of the image that the backbone's operations are counted on


def _own_features(net, x):
    return net.features(x)


def _srresnet_features(net, x):
    return net.body(net.lrelu(net.conv_first(x)))


def _edsr_features(net, x):
    x = net.conv_first((x - net.mean.to(x)) * net.img_range)
    return net.conv_after_body(net.body(x)) + x


# how the features of an arch are computed, and what it has behind them
BACKBONES = {
    'CARN_M': (_own_features, ('upconvs', 'conv_last')),
    'FSRCNN': (_own_features, ('deconv', )),
    'MSRResNet': (_srresnet_features, ('upconv1', 'upconv2', 'conv_hr', 'conv_last')),
    'EDSR': (_edsr_features, ('upsample', 'conv_last')),
    'RCAN': (_edsr_features, ('upsample', 'conv_last'))
}


class PixelGrid(NamedTuple):
    """Where some rows of the upscaled image lie on the LR image: each pixel in the LR pixel nearest to it.

    Attributes:
        rows (Tensor): of shape (H, ), int64. Row of that LR pixel.
        columns (Tensor): of shape (W, ), int64. Its column.
        y (Tensor): of shape (H, ). Position relative to its centre, -1 and 1 being its borders.
        x (Tensor): of shape (W, ).
        cell (Tensor): of shape (2, ). Twice the height and the width of a pixel, in LR pixels.
        heights (tuple[int]): Of the whole LR image and of the whole upscaled one. What the host has to know is computed
            of them, for the tensors may be on a GPU.
    """
    rows: torch.Tensor
    columns: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor
    cell: torch.Tensor
    heights: tuple

    def band(self, top, bottom):
        """The rows from `top` to `bottom`, on an LR image that begins with the first LR row that they need.

        Returns:
            tuple: That grid, the first LR row and the one behind the last (int).
        """
        height, out_height = self.heights
        first, last = ((2 * row + 1) * height // (2 * out_height) for row in (top, bottom - 1))
        return self._replace(rows=self.rows[top:bottom] - first, y=self.y[top:bottom]), first, last + 1

    def first_row(self, row):
        """The first row of the upscaled image that lies in an LR row (int) or below it."""
        height, out_height = self.heights
        return max(0, -((height - 2 * out_height * row) // (2 * height)))


def _nearest(length, out_length, device):
    """Index of the nearest of `length` pixels, and the position relative to it, for each of `out_length` pixels."""
    doubled = (2 * torch.arange(out_length, device=device) + 1) * length  # in whole numbers: no rounding decides
    index = doubled.div(2 * out_length, rounding_mode='floor')
    return index, (doubled - 2 * out_length * index).double().div(out_length).sub(1).float()


def pixel_grid(size, out_size, device=None):
    """
    Args:
        size (tuple[int]): Height and width of the LR image.
        out_size (tuple[int]): Height and width of the upscaled image.
        device (torch.device): Where the grid is wanted. Default: None, the CPU.

    Returns:
        PixelGrid: of the whole image.
    """
    (rows, y), (columns, x) = (_nearest(*lengths, device) for lengths in zip(size, out_size))
    # made where it is wanted, as all of it: a copy from the host would be waited for
    cell = torch.cat([torch.full((1, ), 2 * length / out, device=device) for length, out in zip(size, out_size)])
    return PixelGrid(rows, columns, y, x, cell, (size[0], out_size[0]))


def bilinear(x, size, out_size, top=0, bottom=None, first=0):
    """Bilinear upsampling of any rows of an image: the same as F.interpolate of the whole, at any scale.

    Args:
        x (Tensor): of shape (b, h, w, c), rows of the LR image.
        size (tuple[int]): Height and width of the LR image.
        out_size (tuple[int]): Height and width of the upscaled image.
        top (int), bottom (int): Rows of the upscaled image that are wanted. Default: all.
        first (int): Which row of the LR image x begins with. Default: 0.

    Returns:
        Tensor: of shape (b, bottom - top, W, c).
    """
    bottom = out_size[0] if bottom is None else bottom
    positions = ((row + 0.5) * (size[0] / out_size[0]) - 0.5 for row in (top, bottom - 1))
    begin, last = (int(min(max(position, 0), size[0] - 1)) for position in positions)  # as in _between
    rows = x[:, begin - first:min(last + 1, size[0] - 1) + 1 - first]
    low, high, weight = _between(size[0], out_size[0], top, bottom, x.device)
    left, right, across = _between(size[1], out_size[1], 0, out_size[1], x.device)
    across = across.to(x.dtype).unsqueeze(1).expand(-1, x.shape[3]).contiguous()  # faster than one for three values
    rows = torch.lerp(rows.index_select(2, left), rows.index_select(2, right), across)
    low, high = (rows.index_select(1, index - begin) for index in (low, high))
    return torch.lerp(low, high, weight.to(x).view(-1, 1, 1))


def _between(length, out_length, start, stop, device):
    """Indices of the two pixels, of `length`, that some of `out_length` lie between, and the weights of the second."""
    position = torch.arange(start, stop, device=device).double() + 0.5
    position = position.mul(length / out_length).sub(0.5).clamp(0, length - 1)
    low = position.long()
    return low, (low + 1).clamp(max=length - 1), position - low


def two_means_threshold(values, max_iter=20):
    """Splits values into two clusters by k-means, begun with the least value and the mean, as the published code does.

    Args:
        values (Tensor): of shape (b, n).
        max_iter (int): Most iterations. Default: 20.

    Returns:
        Tensor: of shape (b, ), half way between the clusters' means; NaN if all values of a row are equal.
    """
    total, count = values.double().sum(dim=1), values.shape[1]
    threshold = (values.amin(dim=1) + total / count) / 2
    for _ in range(max_iter):
        upper = values > threshold.unsqueeze(1)
        upper_count = upper.sum(dim=1)
        upper_sum = (values * upper).double().sum(dim=1)
        threshold = (upper_sum / upper_count + (total - upper_sum) / (count - upper_count)) / 2
    return threshold


def refine(picture, heavy):
    """Replaces each light pixel that has a heavy one among its 8 neighbours by the mean of the 3x3 pixels around it.

    Args:
        picture (Tensor): of shape (b, H, W, c).
        heavy (Tensor): of shape (b, H, W), bool.

    Returns:
        Tensor: of shape (b, H, W, c); the outermost pixels are left as they are.
    """
    near = heavy[:, :, :-2] | heavy[:, :, 1:-1] | heavy[:, :, 2:]
    near = near[:, :-2] | near[:, 1:-1] | near[:, 2:]
    near &= ~heavy[:, 1:-1, 1:-1]
    mean = picture[:, :, :-2] + picture[:, :, 1:-1] + picture[:, :, 2:]
    mean = (mean[:, :-2] + mean[:, 1:-1] + mean[:, 2:]) / 9
    refined = picture.clone()
    refined[:, 1:-1, 1:-1] = torch.where(near.unsqueeze(3), mean, picture[:, 1:-1, 1:-1])
    return refined


class PixelMLP(nn.Module):
    """MLP on the features of the nearest LR pixel, the position relative to it, and the cell.

    Its first layer is a sum of a part that is one for each LR pixel (`project`) and one of the position alone: only
    what comes after the sum is computed for every pixel of the upscaled image.

    Args:
        num_feat (int): Channel number of the features.
        num_hidden (list[int]): Widths of the hidden layers.
        num_out_ch (int): Channel number of outputs.
    """

    def __init__(self, num_feat, num_hidden, num_out_ch):
        super(PixelMLP, self).__init__()
        widths = (num_feat + 4, *num_hidden, num_out_ch)
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in zip(widths, widths[1:])])

    def project(self, features, cell):
        """The first layer's sum over features, cell and bias, for LR pixels: (..., num_feat) to (..., n)."""
        first = self.layers[0]
        bias = first.bias + first.weight[:, -2:] @ cell.to(first.bias)
        return F.linear(features.to(first.weight), first.weight[:, :-4], bias)

    @property
    def position_weight(self):
        """The first layer's weights of y and x, of shape (2, n)."""
        return self.layers[0].weight[:, -4:-2].t()

    def macs(self, first=True):
        """Multiply-accumulates per pixel, with those of the first layer or without."""
        return sum(layer.weight.numel() for layer in self.layers[0 if first else 1:])

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (..., n), the first layer's sum. Overwritten.

        Returns:
            Tensor: of shape (..., num_out_ch).
        """
        for layer in self.layers[1:]:
            x = layer(F.relu(x, inplace=True))
        return x


class PixelRouting(NamedTuple):
    """PCSR's decision for each pixel.

    Attributes:
        margin (Tensor): of shape (b, H, W), log p_heavy - log p_light.
        heavy (Tensor): of shape (b, H, W). Probability of the heavy sampler in training; in evaluation whether it was
            taken, bool.
    """
    margin: torch.Tensor
    heavy: torch.Tensor


@ARCH_REGISTRY.register()
class PCSR(nn.Module):
    """Pixel-level classifier for SR: features at LR size, and for each pixel of the result a light or a heavy sampler.

    Paper: Accelerating Image Super-Resolution Networks with Pixel-Level Classification (ECCV 2024).

    In training, the output is the mixture p_light * light + p_heavy * heavy (phase 1), or that of the heavy sampler
    alone (phase 0). In evaluation each pixel has that of one sampler, and only that one is computed. It is added to the
    input, bilinearly upsampled.

    Args:
        backbone (dict): Option block of an arch of BACKBONES. It is used up to its features; what upsamples them is
            left out.
        light (list[int]): Widths of the hidden layers of the light sampler. Default: (20, 20, 20), PCSR-CARN's.
        heavy (list[int]): Those of the heavy sampler. Default: (74, 74, 74, 74).
        classifier (list[int]): Those of the classifier. Default: (10, 10).
        upscale (int | float): Upsampling factor where no size is given. Default: 4.
        phase (int): 0: there is no light sampler and no classifier yet. Default: 1.

    Attributes:
        k (float): The sampler with the largest p / cost^k is taken. 0 at first: the most probable one.
        adaptive (bool): Instead, the probabilities of each image are split into two clusters. False at first.
        refinement (bool): Whether light pixels beside heavy ones are smoothed. True at first.
        costs (tuple[float]): Multiply-accumulates per pixel of the result with each sampler, those of the backbone
            included.
    """

    def __init__(self, backbone, light=(20, 20, 20), heavy=(74, 74, 74, 74), classifier=(10, 10), upscale=4, phase=1):
        super(PCSR, self).__init__()
        backbone = copy.deepcopy(backbone)
        backbone_type = backbone.pop('type', None)
        arch = ARCH_REGISTRY.get(backbone_type) if backbone_type in ARCH_REGISTRY else None
        if arch is None or arch.__name__ not in BACKBONES:
            raise ValueError(f"PCSR: expected a backbone of type {', '.join(BACKBONES)}, but got {backbone_type!r}.")
        if not upscale >= 1:
            raise ValueError(f'PCSR: expected upscale of at least 1, but got {upscale}.')
        if phase not in (0, 1):
            raise ValueError(f'PCSR: expected phase 0 or 1, but got {phase!r}.')
        self.upscale = upscale
        self.phase = phase
        self.k, self.adaptive, self.refinement = 0.0, False, True

        self.backbone = arch(**backbone)
        for name in BACKBONES[arch.__name__][1]:
            if hasattr(self.backbone, name):  # MSRResNet has one upconv less for x2 and x3
                delattr(self.backbone, name)
        self.num_in_ch = backbone.get('num_in_ch', 3)
        from torch.utils.flop_counter import FlopCounterMode  # not in every torch that BasicSR takes
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            num_feat = self.features(torch.zeros(1, self.num_in_ch, COUNTED_SIZE, COUNTED_SIZE)).shape[1]
        self.backbone_macs = counter.get_total_flops() / 2 / COUNTED_SIZE**2  # per LR pixel

        self.heavy = PixelMLP(num_feat, heavy, self.num_in_ch)
        if phase == 1:
            self.light = PixelMLP(num_feat, light, self.num_in_ch)
            self.classifier = PixelMLP(num_feat, classifier, 2)
        self.costs = tuple(self.backbone_macs / upscale**2 + mlp.macs() for mlp in self.samplers)

    # what upscales an image piece by piece has all of it from the network
    grid = staticmethod(pixel_grid)
    bilinear = staticmethod(bilinear)
    refine = staticmethod(refine)

    @property
    def samplers(self):
        """The samplers, the cheaper one first (list[PixelMLP])."""
        return [self.heavy] if self.phase == 0 else [self.light, self.heavy]

    def features(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        return BACKBONES[type(self.backbone).__name__][0](self.backbone, x)

    @staticmethod
    def _sums(mlp, features, grid):
        """The first layer's sums of an MLP at all pixels of a grid, of shape (b, H, W, n)."""
        weight = mlp.position_weight
        x = mlp.project(features, grid.cell).index_select(2, grid.columns) + grid.x[:, None].to(weight) * weight[1]
        return x.index_select(1, grid.rows) + (grid.y[:, None].to(weight) * weight[0]).unsqueeze(1)

    def margin(self, features, grid):
        """How sure it is that pixels need the heavy sampler.

        Args:
            features (Tensor): of shape (b, h, w, num_feat), the LR rows that the grid refers to.
            grid (PixelGrid): of H rows.

        Returns:
            Tensor: of shape (b, H, W), log p_heavy - log p_light.
        """
        logits = self.classifier(self._sums(self.classifier, features, grid))
        return logits[..., 1] - logits[..., 0]

    def threshold(self, margin):
        """The margin above which a pixel is heavy, by k or adaptive.

        Args:
            margin (Tensor): of shape (b, H, W), of whole images.

        Returns:
            Tensor: of shape (b, 1, 1). An image whose probabilities are all equal has no clusters: then it is 0.
        """
        if not self.adaptive:
            return margin.new_full((len(margin), 1, 1), self.k * math.log(self.costs[1] / self.costs[0]))
        probability = two_means_threshold(torch.sigmoid(margin).flatten(1))
        return torch.logit(probability).nan_to_num(nan=0).to(margin).view(-1, 1, 1)

    def sample(self, features, grid, heavy, count=None):
        """What the samplers add to the upsampled input; at each pixel only the chosen one is computed.

        Args:
            features (Tensor): of shape (b, h, w, num_feat), the LR rows that the grid refers to.
            grid (PixelGrid): of H rows.
            heavy (Tensor): of shape (b, H, W), bool. In phase 0 all must be True.
            count (int | None): How many are True. Default: None, that is counted; a GPU is waited for then.

        Returns:
            Tensor: of shape (b, H, W, c).
        """
        b, h, w, _ = features.shape
        images = torch.arange(b, device=heavy.device).view(-1, 1, 1)
        sources = ((images * h + grid.rows.unsqueeze(1)) * w + grid.columns).flatten()
        positions = torch.stack(torch.broadcast_tensors(grid.y.unsqueeze(1), grid.x), dim=2)
        positions = positions.expand(b, -1, -1, -1).flatten(0, 2)
        output = None
        if count is None:
            parts = [chosen.flatten().nonzero().squeeze(1) for chosen in (heavy, ~heavy)]
        else:
            parts = (~heavy).flatten().byte().argsort(stable=True).tensor_split([count])
        for mlp, chosen in zip(self.samplers[::-1], parts):
            if len(chosen) == 0:
                continue
            projected, weight = mlp.project(features, grid.cell).flatten(0, 2), mlp.position_weight
            if projected.dtype != torch.float32:
                # oneDNN compiles and keeps code for every number of rows: let these be few
                chosen = torch.cat([chosen, chosen[-1:].expand(-len(chosen) % ROUNDED_TO)])
            for pixels in chosen.split(SAMPLED_TOGETHER['cuda' if heavy.is_cuda else 'cpu']):
                x = projected.index_select(0, sources.index_select(0, pixels))
                x = mlp(torch.addmm(x, positions.index_select(0, pixels).to(x), weight.to(x)))
                if output is None:
                    output = x.new_empty(heavy.numel(), x.shape[1])
                output[pixels] = x.to(output)
        return output.view(*heavy.shape, -1)

    def forward(self, x, size=None, return_routing=False):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].
            size (tuple[int] | None): Height H and width W of the result. Default: None, those of x times upscale.
            return_routing (bool): Whether to return the routing too. Default: False.

        Returns:
            Tensor: of shape (b, c, H, W), about [0, 1]; or a tuple of it and a PixelRouting (None in phase 0).
        """
        size = tuple(size or (round(length * self.upscale) for length in x.shape[2:]))
        grid = pixel_grid(x.shape[2:], size, x.device)
        features = self.features(x).permute(0, 2, 3, 1)
        residual, routing = self._mix(features, grid) if self.training else self._route(features, grid)
        output = residual.float() + bilinear(x.permute(0, 2, 3, 1), x.shape[2:], size)
        if routing is not None and not self.training and self.refinement:
            output = refine(output, routing.heavy)
        output = output.permute(0, 3, 1, 2).contiguous()
        return (output, routing) if return_routing else output

    def _mix(self, features, grid):
        heavy = self.heavy(self._sums(self.heavy, features, grid))
        if self.phase == 0:
            return heavy, None
        margin = self.margin(features, grid).float()
        probability = torch.sigmoid(margin)
        light = self.light(self._sums(self.light, features, grid))
        return torch.lerp(light.float(), heavy.float(), probability.unsqueeze(3)), PixelRouting(margin, probability)

    def _route(self, features, grid):
        kind = 'cuda' if features.is_cuda else 'cpu'
        height, step = len(grid.rows), max(1, BAND_PIXELS[kind] // (len(features) * len(grid.columns)))
        bands = [grid.band(top, min(height, top + step)) for top in range(0, height, step)]
        if self.phase == 0:
            routing, shape = None, (len(features), height, len(grid.columns))
            heavy = torch.ones(shape, dtype=torch.bool, device=features.device)
        else:
            margin = torch.cat([self.margin(features[:, first:last], band) for band, first, last in bands], dim=1)
            heavy = margin > self.threshold(margin)
            routing = PixelRouting(margin, heavy)
        parts = zip(bands, heavy.split(step, dim=1))
        residual = [self.sample(features[:, first:last], band, part) for (band, first, last), part in parts]
        return torch.cat(residual, dim=1), routing
