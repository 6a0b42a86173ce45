import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


def bilinear_taps(upscale):
    """The 3x3 taps that make each sub-pixel of a pixel by bilinear upsampling.

    Args:
        upscale (int): Upsampling factor.

    Returns:
        Tensor: of shape (upscale*upscale, 3, 3), in the order of a pixel shuffle.
    """
    positions = (torch.arange(upscale) + 0.5) / upscale - 0.5  # of the new pixels, around the old one
    ramp = (1 - (torch.arange(-1, 2) - positions[:, None]).abs()).clamp(min=0)
    return (ramp[:, None, :, None] * ramp[None, :, None, :]).reshape(upscale**2, 3, 3)


class RepConv3x3(nn.Module):
    """A 3x3 conv, trained as three convs and a 1x1 conv beside them, without activation between.

    The weights of these convs are folded before each use, in training too: the result and the gradients are the same,
    and the images pass through one conv with a fifth of the multiply-accumulates.

    Args:
        num_in_ch (int): Channel number of inputs.
        num_out_ch (int): Channel number of outputs.
        deploy (bool): Whether it is the one conv from the start. Default: False.
        expansion (int): The inner 3x3 conv has so many times the channels. Default: 2.
    """

    def __init__(self, num_in_ch, num_out_ch, deploy=False, expansion=2):
        super(RepConv3x3, self).__init__()
        if deploy:
            self.conv = nn.Conv2d(num_in_ch, num_out_ch, 3, padding=1)
            return
        self.expand = nn.Conv2d(num_in_ch, expansion * num_in_ch, 1)
        self.spatial = nn.Conv2d(expansion * num_in_ch, expansion * num_out_ch, 3)
        self.squeeze = nn.Conv2d(expansion * num_out_ch, num_out_ch, 1)
        self.skip = nn.Conv2d(num_in_ch, num_out_ch, 1)

    @property
    def deployed(self):
        """Whether it is one conv."""
        return hasattr(self, 'conv')

    def folded(self, dtype=None):
        """Weight and bias of the one conv that does the same.

        Args:
            dtype (torch.dtype | None): What is computed in. Default: that of the weights.

        Returns:
            tuple[Tensor, Tensor]: of shape (num_out_ch, num_in_ch, 3, 3) and (num_out_ch, ).
        """
        if self.deployed:
            return self.conv.weight, self.conv.bias
        dtype = dtype or self.skip.weight.dtype
        expand, squeeze, skip = (conv.weight[..., 0, 0].to(dtype) for conv in (self.expand, self.squeeze, self.skip))
        spatial = self.spatial.weight.to(dtype)
        # of expand and squeeze, as matrices with the taps beside the channels
        weight = torch.einsum('pmt,mi->pit', torch.einsum('pn,nmt->pmt', squeeze, spatial.flatten(2)), expand)
        weight = weight.unflatten(2, (3, 3)) + F.pad(skip[..., None, None], (1, 1, 1, 1))
        # the border is padded before `expand`, so that its bias is added there too
        bias = squeeze @ (spatial.sum((2, 3)) @ self.expand.bias.to(dtype) + self.spatial.bias.to(dtype))
        return weight, bias + self.squeeze.bias.to(dtype) + self.skip.bias.to(dtype)

    @torch.no_grad()
    def switch_to_deploy(self):
        """Replaces the convs, in place, by the one: for inference, the weights are copied."""
        if self.deployed:
            return
        weight, bias = self.folded(torch.float64)
        # without initialisation, which would draw random numbers
        self.conv = nn.utils.skip_init(
            nn.Conv2d, *reversed(weight.shape[:2]), 3, padding=1, device=weight.device, dtype=self.skip.weight.dtype)
        self.conv.weight.copy_(weight)
        self.conv.bias.copy_(bias)
        for name in ('expand', 'spatial', 'squeeze', 'skip'):
            delattr(self, name)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_in_ch, h, w).

        Returns:
            Tensor: of shape (b, num_out_ch, h, w).
        """
        if self.deployed:
            return self.conv(x)
        # a rounded fold would be another conv
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.folded()
        return F.conv2d(x, weight, bias, padding=1)


class SPAB(nn.Module):
    """Swift parameter-free attention block: its output is weighted by a fixed function of itself.

    Args:
        num_feat (int): Channel number of features.
        deploy (bool): Whether the convs are in their folded form. Default: False.
    """

    def __init__(self, num_feat, deploy=False):
        super(SPAB, self).__init__()
        self.conv1 = RepConv3x3(num_feat, num_feat, deploy)
        self.conv2 = RepConv3x3(num_feat, num_feat, deploy)
        self.conv3 = RepConv3x3(num_feat, num_feat, deploy)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, num_feat, h, w).

        Returns:
            tuple[Tensor, Tensor]: The output and the activated first conv, both of the shape of x.
        """
        first = F.silu(self.conv1(x), inplace=True)
        # in bfloat16 the sum of large features, rounded in each block, would lose more than all convs do
        out = self.conv3(F.silu(self.conv2(first), inplace=True)).to(x.dtype)
        if torch.is_grad_enabled():
            return (out + x) * (torch.sigmoid(out) - 0.5), first
        return torch.sigmoid(out).sub_(0.5).mul_(out.add_(x)), first  # the same, without copies of the features


@ARCH_REGISTRY.register()
class SPAN(nn.Module):
    """SPAN: swift parameter-free attention network.

    Paper: Swift Parameter-free Attention Network for Efficient Super-Resolution (CVPRW 2024).

    Each 3x3 conv but the last is trained as several ones. In evaluation, switch_to_deploy makes one of them, with the
    same result.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs, equal to num_in_ch. Default: 3.
        num_feat (int): Channel number of intermediate features. Default: 48.
        num_block (int): Number of blocks. Default: 6.
        upscale (int): Upsampling factor. Default: 4.
        img_range (float): The network sees pixels from 0 to img_range: the attention is made for features of about this
            size. Default: 255.
        rgb_mean (tuple[float]): Image mean in RGB order; of a gray image it is the mean of the three. Default:
            (0.4488, 0.4371, 0.4040), that of DIV2K.
        deploy (bool): Whether the network has its folded form from the start, as published checkpoints do. img_range is
            then part of the weights. Default: False.
    """

    def __init__(self,
                 num_in_ch=3,
                 num_out_ch=3,
                 num_feat=48,
                 num_block=6,
                 upscale=4,
                 img_range=255.,
                 rgb_mean=(0.4488, 0.4371, 0.4040),
                 deploy=False):
        super(SPAN, self).__init__()
        if num_in_ch != num_out_ch:
            raise ValueError(f'SPAN: expected as many outputs as inputs, but got {num_out_ch} and {num_in_ch}.')
        if num_block < 1:
            raise ValueError(f'SPAN: expected num_block of at least 1, but got {num_block}.')
        self.upscale, self.img_range, self.deployed = upscale, img_range, deploy
        mean = torch.tensor(rgb_mean)
        if len(mean) != num_in_ch:
            mean = mean.mean().repeat(num_in_ch)
        # of three dimensions, because DistributedDataParallel cannot broadcast a single buffer that is channels last
        self.register_buffer('mean', mean.view(-1, 1, 1), persistent=False)

        self.conv_first = RepConv3x3(num_in_ch, num_feat, deploy)
        self.body = nn.ModuleList([SPAB(num_feat, deploy) for _ in range(num_block)])
        self.conv_after_body = RepConv3x3(num_feat, num_feat, deploy)
        self.conv_cat = nn.Conv2d(4 * num_feat, num_feat, 1)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1)
        for conv in (self.conv_cat, self.conv_last):
            conv.keeps_float32 = True  # see forward
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Starts as bilinear upsampling: the network need not learn first what interpolation knows.

        One channel per colour passes from the first conv through the long skip connection to the last conv. The other
        channels start random, and count nothing there at first.
        """
        colors, num_feat = len(self.mean), self.conv_cat.out_channels
        if self.deployed or colors > num_feat:
            return
        carried = torch.eye(colors)
        for conv in (self.conv_first.squeeze, self.conv_first.skip, self.conv_cat):
            conv.weight[:colors] = 0
            conv.bias[:colors] = 0
        self.conv_first.skip.weight[:colors, :, 0, 0] = carried
        self.conv_cat.weight[:colors, :colors, 0, 0] = carried
        nn.init.zeros_(self.conv_last.weight)
        self.conv_last.weight[:, :colors] = (carried[:, None, :, None, None] *
                                             bilinear_taps(self.upscale)[:, None]).flatten(0, 1)
        self.conv_last.bias.zero_()

    @torch.no_grad()
    def switch_to_deploy(self):
        """Folds, in place, convs that are trained as several, and the range of pixels: for inference, the weights are
        copied.
        """
        if self.deployed:
            return
        for module in self.modules():
            if isinstance(module, RepConv3x3):
                module.switch_to_deploy()
        self.conv_first.conv.weight.mul_(self.img_range)
        self.conv_last.weight.div_(self.img_range)
        mean = self.mean.flatten().repeat_interleave(self.upscale**2)
        self.conv_last.bias.div_(self.img_range).add_(mean)
        self.deployed = True

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        x = x - self.mean
        if not self.deployed:
            x = x * self.img_range
        first = out = self.conv_first(x).to(self.conv_last.weight.dtype)
        outputs = []
        for block in self.body:
            out, activated = block(out)
            outputs.append(out)
        parts = [part.to(first.dtype) for part in (first, self.conv_after_body(out), outputs[0], activated)]
        # the image itself passes here: a rounding is a visible one
        with torch.autocast(x.device.type, enabled=False):
            out = F.pixel_shuffle(self.conv_last(self.conv_cat(torch.cat(parts, dim=1))), self.upscale)
        return out if self.deployed else out / self.img_range + self.mean
