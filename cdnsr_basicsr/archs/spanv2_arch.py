import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


def _conv3x3(num_in_ch, num_out_ch, groups=1):
    return nn.Conv2d(num_in_ch, num_out_ch, 3, padding=1, groups=groups, bias=False)


class FirstBlock(nn.Module):
    """Three 3x3 convs, each with a ReLU, that make features of the image.

    Args:
        num_in_ch (int): Channel number of inputs.
        num_feat (int): Channel number of features.
    """

    def __init__(self, num_in_ch, num_feat):
        super(FirstBlock, self).__init__()
        self.conv1 = _conv3x3(num_in_ch, num_feat)
        self.conv2 = _conv3x3(num_feat, num_feat)
        self.conv3 = _conv3x3(num_feat, num_feat)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_in_ch, h, w).

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x), inplace=True)
        return x


class GuidedBlock(nn.Module):
    """Three 3x3 convs with a skip connection, weighted by a guidance map of what they have found.

    Args:
        num_feat (int): Channel number of features.
    """

    def __init__(self, num_feat):
        super(GuidedBlock, self).__init__()
        self.conv1 = _conv3x3(num_feat, num_feat)
        self.conv2 = _conv3x3(num_feat, num_feat)
        self.conv3 = _conv3x3(num_feat, num_feat)
        self.guidance = nn.Conv2d(num_feat, num_feat, 1)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w).

        Returns:
            Tensor: of shape (b, num_feat, h, w).
        """
        out = F.relu(self.conv1(x), inplace=True)
        out = F.relu(self.conv2(out), inplace=True)
        out = self.conv3(out)
        return (out + x) * self.guidance(out)


@ARCH_REGISTRY.register()
class SPANV2(nn.Module):
    """SPANV2: SPAN's successor, with ReLUs and a learnt guidance map; the winner of the NTIRE 2026 challenge on
    efficient super-resolution.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs, equal to num_in_ch. Default: 3.
        num_feat (int): Channel number of intermediate features. Default: 32.
        num_block (int): Number of blocks, the first one included. Default: 5.
        upscale (int): Upsampling factor. Default: 4.
    """

    def __init__(self, num_in_ch=3, num_out_ch=3, num_feat=32, num_block=5, upscale=4):
        super(SPANV2, self).__init__()
        if num_in_ch != num_out_ch:
            raise ValueError(f'SPANV2: expected as many outputs as inputs, but got {num_out_ch} and {num_in_ch}.')
        if num_block < 1:
            raise ValueError(f'SPANV2: expected num_block of at least 1, but got {num_block}.')
        self.upscale = upscale
        num_sub_pixels = num_out_ch * upscale**2
        self.body = nn.Sequential(
            FirstBlock(num_in_ch, num_feat), *[GuidedBlock(num_feat) for _ in range(num_block - 1)])
        self.conv_near = _conv3x3(num_in_ch, num_sub_pixels, groups=num_in_ch)
        self.conv_depthwise = _conv3x3(
            num_sub_pixels + num_feat, num_sub_pixels + num_feat, groups=num_sub_pixels + num_feat)
        self.conv_last = nn.Conv2d(num_sub_pixels + num_feat, num_sub_pixels, 1, bias=False)
        for conv in (self.conv_near, self.conv_depthwise, self.conv_last):
            conv.keeps_float32 = True  # see forward
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Starts as bilinear upsampling by conv_near: the network need not learn first what interpolation knows. The
        published network starts as pixel repetition.

        The features count nothing in the last conv at first. They come through the blocks as in a residual network: He
        initialisation where a ReLU follows, and a guidance map of about 1. (As torch initialises it, it is about 0, and
        so are the features after a few blocks.)
        """
        for block in self.body:
            for conv in (block.conv1, block.conv2, block.conv3):
                nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
            if isinstance(block, GuidedBlock):
                block.conv3.weight.mul_(0.1)
                block.guidance.weight.mul_(0.1)
                nn.init.ones_(block.guidance.bias)
        num_sub_pixels = self.conv_last.out_channels
        positions = (torch.arange(self.upscale) + 0.5) / self.upscale - 0.5  # of the new pixels, around the old one
        ramp = (1 - (torch.arange(-1, 2) - positions[:, None]).abs()).clamp(min=0)
        taps = (ramp[:, None, :, None] * ramp[None, :, None, :]).reshape(-1, 1, 3, 3)
        self.conv_near.weight.copy_(taps.repeat(self.conv_near.in_channels, 1, 1, 1))
        self.conv_depthwise.weight[:num_sub_pixels] = 0
        self.conv_depthwise.weight[:num_sub_pixels, :, 1, 1] = 1
        nn.init.zeros_(self.conv_last.weight)
        self.conv_last.weight[:, :num_sub_pixels, 0, 0] = torch.eye(num_sub_pixels)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        features, dtype = self.body(x), self.conv_last.weight.dtype
        # the image itself passes here: a rounding is a visible one
        with torch.autocast(x.device.type, enabled=False):
            out = self.conv_depthwise(torch.cat([self.conv_near(x.to(dtype)), features.to(dtype)], dim=1))
            return F.pixel_shuffle(self.conv_last(out), self.upscale)
