import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


class _FastPReLU(torch.autograd.Function):
    """PReLU with one slope, as the leaky ReLU that it is: its backward pass is 6 times faster on a CPU."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.slope, ctx.dtype = weight.item(), weight.dtype
        return F.leaky_relu(x, ctx.slope)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_x = torch.ops.aten.leaky_relu_backward(grad, x, ctx.slope, False)
        return grad_x, x.clamp(max=0).mul_(grad).sum(dtype=ctx.dtype).view(1)


class PReLU(nn.PReLU):
    """PReLU with one slope for all channels, faster in training on a CPU."""

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w).

        Returns:
            Tensor: of shape (b, c, h, w).
        """
        # a GPU has one kernel for it, and so has what torch.compile makes
        fast = self.training and not x.is_cuda and not torch.compiler.is_compiling()
        return _FastPReLU.apply(x, self.weight) if fast else super(PReLU, self).forward(x)


def sub_pixel_taps(weight, stride, padding):
    """The weight of the conv at LQ size that, followed by a pixel shuffle, is a transposed conv.

    Args:
        weight (Tensor): of shape (num_in_ch, num_out_ch, kernel_size, kernel_size).
        stride (int): Stride of the transposed conv.
        padding (int): Its padding.

    Returns:
        Tensor: of shape (num_out_ch*stride*stride, num_in_ch, size, size), size odd.
    """
    num_in_ch, num_out_ch, kernel_size, _ = weight.shape
    # GT pixel stride * y + r sees LQ pixel y + d through tap r + padding - stride * d
    radius = max((stride - 1 + padding) // stride, (kernel_size - 1 - padding) // stride)
    size = 2 * radius + 1
    before = stride * radius - padding
    after = size * stride - kernel_size - before
    taps = F.pad(weight, (before, after, before, after)).view(num_in_ch, num_out_ch, size, stride, size, stride)
    return taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(-1, num_in_ch, size, size)


class _SubPixelDeconv(torch.autograd.Function):
    """A transposed conv, computed forward as a conv at LQ size and a pixel shuffle, backward as what it is.

    On a CPU the forward pass of a transposed conv with few output channels is slow, its backward pass is not. The conv
    multiplies some zeros and is still 2.5 times faster.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, output_padding):
        ctx.geometry, ctx.bias_dtype = (stride, padding, output_padding), bias.dtype
        taps = sub_pixel_taps(weight, stride, padding)
        output = F.conv2d(x, taps, bias.repeat_interleave(stride * stride), padding=taps.shape[-1] // 2)
        ctx.save_for_backward(x.to(output.dtype), weight.to(output.dtype))
        return F.pixel_shuffle(output, stride)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, output_padding = ctx.geometry
        geometry = ([stride] * 2, [padding] * 2, [1, 1], True, [output_padding] * 2, 1)
        mask = (*ctx.needs_input_grad[:2], False)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)
        # by itself: together with the weight's it takes five times as long
        grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


class Deconv(nn.ConvTranspose2d):
    """Transposed conv, faster in training and, after switch_to_deploy, in evaluation.

    Arguments as of nn.ConvTranspose2d; square kernel, with bias.
    """

    @torch.no_grad()
    def switch_to_deploy(self):
        """From now on evaluates as a conv at LQ size and a pixel shuffle: for inference, the weights are copied."""
        stride = self.stride[0]
        taps = sub_pixel_taps(self.weight, stride, self.padding[0])
        # without initialisation, which would draw random numbers
        self.deploy = nn.utils.skip_init(
            nn.Conv2d, *reversed(taps.shape[:2]), taps.shape[-1], padding=taps.shape[-1] // 2, device=taps.device)
        self.deploy.weight.copy_(taps)
        self.deploy.bias.copy_(self.bias.repeat_interleave(stride * stride))

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w).

        Returns:
            Tensor: of shape (b, c, h*stride, w*stride), if padding and output_padding are chosen so.
        """
        stride = self.stride[0]
        if self.training:
            return _SubPixelDeconv.apply(x, self.weight, self.bias, stride, self.padding[0], self.output_padding[0])
        if hasattr(self, 'deploy'):
            return F.pixel_shuffle(self.deploy(x), stride)
        return super(Deconv, self).forward(x)


@ARCH_REGISTRY.register()
class FSRCNN(nn.Module):
    """FSRCNN on RGB images, in the form that ClassSR and CDNSR use, or in its original one.

    Paper: Accelerating the Super-Resolution Convolutional Neural Network (ECCV 2016).

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs. Default: 3.
        num_feat (int): Channel number d of the feature extraction. Default: 56.
        num_shrink (int): Channel number s of the mapping. Default: 12.
        num_map (int): Number m of mapping convs. Default: 4.
        upscale (int): Upsampling factor, 1 to 9. Default: 4.
        original (bool): Whether every conv is followed by a PReLU with a slope per channel, and the deconvolution is
            padded by 4, as in the paper. Otherwise PReLUs have one slope and there is none between the mapping convs.
            Default: False.
    """

    def __init__(self, num_in_ch=3, num_out_ch=3, num_feat=56, num_shrink=12, num_map=4, upscale=4, original=False):
        super(FSRCNN, self).__init__()
        if not 1 <= upscale <= 9:
            raise ValueError(f'FSRCNN: expected upscale from 1 to 9, but got {upscale}.')
        self.upscale = upscale
        act = nn.PReLU if original else lambda _: PReLU()
        self.extract = nn.Sequential(nn.Conv2d(num_in_ch, num_feat, 5, padding=2), act(num_feat))
        self.shrink = nn.Sequential(nn.Conv2d(num_feat, num_shrink, 1), act(num_shrink))
        maps = []
        for i in range(num_map):
            maps.append(nn.Conv2d(num_shrink, num_shrink, 3, padding=1))
            if original or i == num_map - 1:
                maps.append(act(num_shrink))
        self.map = nn.Sequential(*maps)
        self.expand = nn.Sequential(nn.Conv2d(num_shrink, num_feat, 1), act(num_feat))
        # Exactly h*upscale pixels, each LQ pixel's kernel centred on its GT pixels as nearly as the parities allow.
        # ClassSR's code has padding 3 and output_padding 1, which is this for x4 and the wrong size for any other.
        padding = 4 if original else (10 - upscale) // 2
        self.deconv = Deconv(
            num_feat, num_out_ch, 9, stride=upscale, padding=padding, output_padding=upscale - 9 + 2 * padding)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """He initialisation (section 3.3 of the paper), but starting as bilinear upsampling.

        One channel per colour is passed through all layers and upsampled by the deconvolution; the other channels start
        random. The network need not learn first what interpolation knows, which takes the paper's initialisation
        thousands of iterations.
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, a=0.25)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.deconv.weight, std=0.001)
        nn.init.zeros_(self.deconv.bias)

        colors = self.deconv.out_channels
        if not self.extract[0].in_channels == colors <= min(self.shrink[0].in_channels, self.shrink[0].out_channels):
            return
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                m.weight[:colors] = 0
                for i in range(colors):
                    m.weight[i, i, m.kernel_size[0] // 2, m.kernel_size[1] // 2] = 1
        # distance of the kernel's taps from the centre of an LQ pixel, in GT pixels
        distance = (torch.arange(9) - self.deconv.padding[0] - (self.upscale - 1) / 2).abs()
        ramp = (1 - distance / self.upscale).clamp(min=0)
        self.deconv.weight[:colors] = 0
        for i in range(colors):
            self.deconv.weight[i, i] = ramp[:, None] * ramp

    def features(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, num_feat, h, w), what is upsampled.
        """
        return self.expand(self.map(self.shrink(self.extract(x))))

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        return self.deconv(self.features(x))
