import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY

POOL = 8  # pixels, each way, of which the non-local branch sees the largest


def _halves(tensor, dim=0):
    """Reorders a dimension: even indices first, then odd ones."""
    return torch.cat(tensor.unflatten(dim, (-1, 2)).unbind(dim + 1), dim)


def variance(x):
    """The variance of each channel; torch.var is 7 times as slow for images that are channels last.

    Args:
        x (Tensor): of shape (b, c, h, w).

    Returns:
        Tensor: of shape (b, c, 1, 1).
    """
    deviation = x - x.mean((2, 3), keepdim=True)
    return deviation.square().sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)


class LocalDetail(nn.Module):
    """Local detail estimation: a depthwise conv and a small network for each pixel.

    Args:
        num_feat (int): Channel number of features.
    """

    def __init__(self, num_feat):
        super(LocalDetail, self).__init__()
        self.conv_depthwise = nn.Conv2d(num_feat, 2 * num_feat, 3, padding=1, groups=num_feat)
        self.conv1 = nn.Conv2d(2 * num_feat, 2 * num_feat, 1)
        self.conv2 = nn.Conv2d(2 * num_feat, num_feat, 1)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w).

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        # Torch is slow for depthwise convs that make two channels of one: the input twice, beside itself, is 4 times as
        # fast on a CPU. The order of the channels in between changes.
        conv, weight = self.conv_depthwise, self.conv1.weight
        out = F.conv2d(
            torch.cat([x, x], dim=1), _halves(conv.weight), _halves(conv.bias), padding=1, groups=conv.out_channels)
        out = F.conv2d(out, _halves(weight, dim=1), self.conv1.bias)
        return self.conv2(F.gelu(out))


class SMFA(nn.Module):
    """Self-modulation feature aggregation: features weighted by what surrounds them, and local detail beside.

    Args:
        num_feat (int): Channel number of features.
    """

    def __init__(self, num_feat):
        super(SMFA, self).__init__()
        self.conv_first = nn.Conv2d(num_feat, 2 * num_feat, 1)
        self.conv_depthwise = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=num_feat)
        self.alpha = nn.Parameter(torch.ones(1, num_feat, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_feat, 1, 1))
        self.conv_modulation = nn.Conv2d(num_feat, num_feat, 1)
        self.local_detail = LocalDetail(num_feat)
        self.conv_last = nn.Conv2d(num_feat, num_feat, 1)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w), h and w at least 8.

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        h, w = x.shape[2:]
        detail, x = self.conv_first(x).chunk(2, dim=1)
        if h % POOL or w % POOL:
            surroundings = F.adaptive_max_pool2d(x, (h // POOL, w // POOL))
        else:  # the same, which can be exported too
            surroundings = F.max_pool2d(x, POOL)
        surroundings = self.conv_depthwise(surroundings)
        # the variance is that of the whole image
        modulation = F.gelu(self.conv_modulation(surroundings * self.alpha + variance(x) * self.beta))
        modulated = x * F.interpolate(modulation, size=(h, w), mode='nearest')
        return self.conv_last(modulated + self.local_detail(detail))


class PCFN(nn.Module):
    """Partial-convolution feed-forward network: a 3x3 conv sees a quarter of the hidden channels.

    Args:
        num_feat (int): Channel number of features, an even number.
    """

    def __init__(self, num_feat):
        super(PCFN, self).__init__()
        self.num_partial = num_feat // 2
        self.conv_first = nn.Conv2d(num_feat, 2 * num_feat, 1)
        self.conv_partial = nn.Conv2d(self.num_partial, self.num_partial, 3, padding=1)
        self.conv_last = nn.Conv2d(2 * num_feat, num_feat, 1)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w).

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        x = F.gelu(self.conv_first(x))
        partial, rest = x.split([self.num_partial, x.shape[1] - self.num_partial], dim=1)
        out = F.gelu(self.conv_partial(partial))
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            return self.conv_last(torch.cat([out, rest], dim=1))
        partial.copy_(out)  # into x: the rest need not be copied
        return self.conv_last(x)


class FMB(nn.Module):
    """Feature modulation block: SMFA and PCFN, each with a skip connection.

    Args:
        num_feat (int): Channel number of features.
    """

    def __init__(self, num_feat):
        super(FMB, self).__init__()
        self.smfa = SMFA(num_feat)
        self.pcfn = PCFN(num_feat)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w), h and w at least 8.

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        x = x + self.smfa(F.normalize(x))
        return x + self.pcfn(F.normalize(x))


@ARCH_REGISTRY.register()
class SMFANet(nn.Module):
    """SMFANet: self-modulation feature aggregation network.

    Paper: SMFANet: A Lightweight Self-Modulation Feature Aggregation Network for Efficient Image Super-Resolution
    (ECCV 2024). SMFANet+ is the network with num_feat=48 and num_block=12.

    Images of fewer than 8 pixels are padded. The network depends on the size of the image: it sees the largest features
    of about 8x8 pixels, and the variance of the whole image.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs. Default: 3.
        num_feat (int): Channel number of intermediate features, an even number. Default: 36.
        num_block (int): Number of blocks. Default: 8.
        upscale (int): Upsampling factor. Default: 4.
    """

    export_multiple = POOL  # of the sides of images, for ONNX, which has no adaptive pooling

    def __init__(self, num_in_ch=3, num_out_ch=3, num_feat=36, num_block=8, upscale=4):
        super(SMFANet, self).__init__()
        if num_feat % 2:
            raise ValueError(f'SMFANet: expected an even num_feat, but got {num_feat}.')
        self.upscale = upscale
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.Sequential(*[FMB(num_feat) for _ in range(num_block)])
        self.conv_last = nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Starts as bilinear upsampling: the network need not learn first what interpolation knows.

        One channel per colour passes through all skip connections to the last conv. The other channels start random,
        and count nothing there at first.
        """
        colors = self.conv_first.in_channels
        if self.conv_last.out_channels != colors * self.upscale**2 or colors > self.conv_first.out_channels:
            return
        carried = torch.eye(colors)
        for block in self.body:
            for conv in (block.smfa.conv_last, block.pcfn.conv_last):
                conv.weight[:colors] = 0
                conv.bias[:colors] = 0
        self.conv_first.weight[:colors] = 0
        self.conv_first.weight[:colors, :, 1, 1] = carried
        self.conv_first.bias[:colors] = 0
        positions = (torch.arange(self.upscale) + 0.5) / self.upscale - 0.5  # of the new pixels, around the old one
        ramp = (1 - (torch.arange(-1, 2) - positions[:, None]).abs()).clamp(min=0)
        taps = (ramp[:, None, :, None] * ramp[None, :, None, :]).reshape(-1, 3, 3)
        nn.init.zeros_(self.conv_last.weight)
        # it sees the first conv twice: through the blocks, and through the skip connection around them
        self.conv_last.weight[:, :colors] = (carried[:, None, :, None, None] * taps[:, None]).flatten(0, 1) / 2
        self.conv_last.bias.zero_()

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        h, w = x.shape[2:]
        if min(h, w) < POOL:
            x = F.pad(x, (0, max(0, POOL - w), 0, max(0, POOL - h)), mode='replicate')
        first = self.conv_first(x)
        out = F.pixel_shuffle(self.conv_last(self.body(first) + first), self.upscale)
        return out[..., :h * self.upscale, :w * self.upscale]
