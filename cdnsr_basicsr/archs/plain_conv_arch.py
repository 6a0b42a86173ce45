import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


@ARCH_REGISTRY.register()
class PlainConvSR(nn.Module):
    """Plain 3x3 convs with an activation between them and a pixel shuffle, which is what mobile devices run fastest.

    Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).
    ETDS becomes this network (section 3.1). With residual=True it is ABPN (relu) and ECBSR after its
    re-parameterisation (prelu).

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs. Default: 3.
        upscale (int): Upsampling factor. Default: 4.
        num_feat (int | list[int]): Channel number of every conv but the last, or one for each of them. Default: 32.
        num_block (int): Number of convs between the first and the last. Default: 4.
        act_type (str): 'relu' | 'prelu' (one slope for each channel). Default: 'relu'.
        residual (bool): Whether the input, each pixel repeated, is added to the output. Default: False.
        clip (bool): Whether the output is clipped to [0, 1] by layers of the network: conv_last makes 1 - y, and a 1x1
            conv between two ReLUs, which is not trained, 1 - relu(1 - y). Not with residual. Default: True.
    """

    def __init__(self,
                 num_in_ch=3,
                 num_out_ch=3,
                 upscale=4,
                 num_feat=32,
                 num_block=4,
                 act_type='relu',
                 residual=False,
                 clip=True):
        super(PlainConvSR, self).__init__()
        widths = [num_feat] * (num_block + 1) if isinstance(num_feat, int) else list(num_feat)
        if len(widths) != num_block + 1:
            raise ValueError(
                f'PlainConvSR: expected num_feat for num_block + 1 = {num_block + 1} convs, but got {widths}.')
        if act_type not in ('relu', 'prelu'):
            raise ValueError(f"PlainConvSR: expected act_type 'relu' or 'prelu', but got {act_type!r}.")
        if residual and num_in_ch != num_out_ch:
            raise ValueError(
                f'PlainConvSR: residual needs as many inputs as outputs, but got {num_in_ch} and {num_out_ch}.')
        if residual and clip:
            raise ValueError('PlainConvSR: residual=True needs clip=False; the sum cannot be clipped by a conv.')
        self.upscale, self.act_type, self.residual, self.clip = upscale, act_type, residual, clip
        self.num_sub_pixels = num_out_ch * upscale**2
        # the published converted networks have multiples of 4 here (28 instead of 27 for x3)
        num_last = -(-self.num_sub_pixels // 4) * 4 if clip else self.num_sub_pixels

        self.conv_first = nn.Conv2d(num_in_ch, widths[0], 3, padding=1)
        self.backbone_convs = nn.ModuleList(
            [nn.Conv2d(*pair, kernel_size=3, padding=1) for pair in zip(widths, widths[1:])])
        self.acts = nn.ModuleList(
            [nn.PReLU(width) if act_type == 'prelu' else nn.ReLU(inplace=True) for width in widths])
        self.conv_last = nn.Conv2d(widths[-1], num_last, 3, padding=1)
        if clip:
            self.conv_clip = nn.Conv2d(num_last, num_last, 1).requires_grad_(False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """He initialisation, zero for the last conv: starts as nearest-neighbour upsampling (residual) or gray."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.conv_last.weight)
        if not self.residual:
            nn.init.constant_(self.conv_last.bias, 0.5)
        if self.clip:
            self.set_clip()

    @torch.no_grad()
    def set_clip(self):
        """Lets conv_clip make 1 - x of each channel x."""
        nn.init.zeros_(self.conv_clip.weight)
        self.conv_clip.weight[..., 0, 0].fill_diagonal_(-1)
        nn.init.ones_(self.conv_clip.bias)

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), in [0, 1] with clip, about [0, 1] without.
        """
        out = x
        for conv, act in zip([self.conv_first, *self.backbone_convs], self.acts):
            out = act(conv(out))
        out = self.conv_last(out)
        if self.residual:
            out = out + x.repeat_interleave(self.upscale**2, dim=1)
        if self.clip:
            out = F.relu(self.conv_clip(F.relu(out)))[:, :self.num_sub_pixels]
        return F.pixel_shuffle(out, self.upscale)
