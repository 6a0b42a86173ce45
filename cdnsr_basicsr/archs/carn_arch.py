import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


class EfficientResidualBlock(nn.Module):
    """Two grouped 3x3 convs and a 1x1 conv with a skip connection.

    Args:
        num_feat (int): Channel number of intermediate features.
        group (int): Groups of the 3x3 convs.
    """

    def __init__(self, num_feat, group):
        super(EfficientResidualBlock, self).__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=group)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=group)
        self.conv3 = nn.Conv2d(num_feat, num_feat, 1)

    def forward(self, x):
        out = F.relu(self.conv1(x), inplace=True)
        out = F.relu(self.conv2(out), inplace=True)
        return F.relu(self.conv3(out) + x, inplace=True)


class Cascade(nn.Module):
    """Runs three bodies one after the other; a 1x1 conv fuses what came out so far before each next one.

    Args:
        bodies (list[nn.Module]): Three modules, or three times the same one (weights are then shared).
        num_feat (int): Channel number of intermediate features.
        fusion_bias (bool): Whether the fusion convs have a bias.
    """

    def __init__(self, bodies, num_feat, fusion_bias):
        super(Cascade, self).__init__()
        shared = all(body is bodies[0] for body in bodies)
        self.bodies = nn.ModuleList(bodies[:1] if shared else bodies)
        self.fusions = nn.ModuleList([nn.Conv2d(num_feat * (i + 2), num_feat, 1, bias=fusion_bias) for i in range(3)])

    def forward(self, x):
        collected, out = x, x
        for i, fusion in enumerate(self.fusions):
            collected = torch.cat([collected, self.bodies[min(i, len(self.bodies) - 1)](out)], dim=1)
            out = F.relu(fusion(collected), inplace=True)
        return out


def set_rows(conv, num_rows, matrix):
    """Makes the first output channels of a conv a linear map, matrix (num_rows, c), of the pixel itself."""
    conv.weight[:num_rows] = 0
    conv.weight[:num_rows, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = matrix
    if conv.bias is not None:
        conv.bias[:num_rows] = 0


@ARCH_REGISTRY.register()
class CARN_M(nn.Module):
    """CARN-M: cascading residual network with grouped convs and shared residual blocks.

    Paper: Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network (ECCV 2018).
    The fusion convs have no bias in ClassSR and CDNSR, and one in the original network and in ARM-Net.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs. Default: 3.
        num_feat (int): Channel number of intermediate features, a multiple of group. Default: 64.
        upscale (int): Upsampling factor. Supports x2, x3 and x4. Default: 4.
        group (int): Groups of the 3x3 convs. Default: 4.
        fusion_bias (bool): Whether the 1x1 fusion convs have a bias. Default: False.
        rgb_mean (tuple[float]): Image mean in RGB order. Default: (0.4488, 0.4371, 0.4040), that of DIV2K.
    """

    def __init__(self,
                 num_in_ch=3,
                 num_out_ch=3,
                 num_feat=64,
                 upscale=4,
                 group=4,
                 fusion_bias=False,
                 rgb_mean=(0.4488, 0.4371, 0.4040)):
        super(CARN_M, self).__init__()
        if upscale not in (2, 3, 4):
            raise ValueError(f'CARN_M: expected upscale 2, 3 or 4, but got {upscale}.')
        if num_feat % group != 0:
            raise ValueError(f'CARN_M: expected num_feat to be a multiple of group {group}, but got {num_feat}.')
        self.upscale = upscale
        # a constant: the published code optimises it by mistake. Of three dimensions, because DistributedDataParallel
        # cannot broadcast a single buffer that is channels last
        self.register_buffer('mean', torch.tensor(rgb_mean).view(-1, 1, 1), persistent=False)

        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        blocks = []
        for _ in range(3):
            body = EfficientResidualBlock(num_feat, group)
            blocks.append(Cascade([body, body, body], num_feat, fusion_bias))
        self.body = Cascade(blocks, num_feat, fusion_bias)

        self.factor = 3 if upscale == 3 else 2
        self.upconvs = nn.ModuleList([
            nn.Conv2d(num_feat, num_feat * self.factor**2, 3, padding=1, groups=group)
            for _ in range(2 if upscale == 4 else 1)
        ])
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Starts as bilinear upsampling: the network need not learn first what interpolation knows.

        Two channels per colour, its positive and its negative part, pass through all layers unchanged and are upsampled
        by the sub-pixel convs; the other channels start random, and count little in the last conv.
        """
        colors = self.conv_last.out_channels
        carried = 2 * colors
        if self.conv_first.in_channels != colors or carried > self.conv_first.out_channels // self.upconvs[0].groups:
            return
        signs = torch.cat([torch.eye(colors), -torch.eye(colors)])
        set_rows(self.conv_first, carried, signs)
        for m in self.modules():
            if isinstance(m, EfficientResidualBlock):
                set_rows(m.conv3, carried, torch.zeros(carried, m.conv3.in_channels))
            elif isinstance(m, Cascade):
                for fusion in m.fusions:  # takes what the latest body gave
                    latest = torch.zeros(carried, fusion.in_channels)
                    latest[:, fusion.in_channels - fusion.out_channels:][:, :carried] = torch.eye(carried)
                    set_rows(fusion, carried, latest)
        positions = (torch.arange(self.factor) + 0.5) / self.factor - 0.5  # of the new pixels, around the old one
        ramp = (1 - (torch.arange(-1, 2) - positions[:, None]).abs()).clamp(min=0)
        for upconv in self.upconvs:
            rows = carried * self.factor**2
            upconv.weight[:rows] = 0
            upconv.bias[:rows] = 0
            for i in range(carried):
                for j in range(self.factor**2):
                    upconv.weight[i * self.factor**2 + j, i] = ramp[j // self.factor][:, None] * ramp[j % self.factor]
        self.conv_last.weight.mul_(0.1)
        self.conv_last.weight[:, :carried] = 0
        self.conv_last.weight[:, :carried, 1, 1] = signs.t()
        self.conv_last.bias.zero_()

    def features(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, num_feat, h, w), what is upsampled.
        """
        return self.body(self.conv_first(x - self.mean))

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        out = self.features(x)
        for upconv in self.upconvs:
            out = F.pixel_shuffle(F.relu(upconv(out), inplace=True), self.factor)
        return self.conv_last(out) + self.mean
