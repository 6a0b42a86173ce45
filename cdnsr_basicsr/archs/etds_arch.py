import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


def _conv3x3(num_in_ch, num_out_ch):
    return nn.Conv2d(num_in_ch, num_out_ch, 3, padding=1)


@ARCH_REGISTRY.register()
class ETDS(nn.Module):
    """ETDS in its training form: a stream of features and a narrow one that carries the image.

    Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).

    In evaluation, switch_to_deploy makes plain convs of the two streams, with the same result.

    Args:
        num_in_ch (int): Channel number of inputs. Default: 3.
        num_out_ch (int): Channel number of outputs, equal to num_in_ch. Default: 3.
        upscale (int): Upsampling factor. Default: 4.
        num_block (int): Number of convs between the first and the last. Default: 4.
        num_feat (int): Channel number of both streams together. Default: 32.
        num_residual_feat (int): Channel number of the residual stream, num_in_ch at least. Default: 3.
    """

    def __init__(self, num_in_ch=3, num_out_ch=3, upscale=4, num_block=4, num_feat=32, num_residual_feat=3):
        super(ETDS, self).__init__()
        if num_in_ch != num_out_ch:
            raise ValueError(f'ETDS: expected as many outputs as inputs, but got {num_out_ch} and {num_in_ch}.')
        if not num_in_ch <= num_residual_feat < num_feat:
            raise ValueError(f'ETDS: expected num_residual_feat from num_in_ch ({num_in_ch}) to less than num_feat '
                             f'({num_feat}), but got {num_residual_feat}.')
        self.upscale = upscale
        num_feat = num_feat - num_residual_feat
        num_sub_pixels = num_out_ch * upscale**2
        self.conv_first = _conv3x3(num_in_ch, num_feat)
        self.conv_residual_first = _conv3x3(num_in_ch, num_residual_feat)
        self.backbone_convs = nn.ModuleList([_conv3x3(num_feat, num_feat) for _ in range(num_block)])
        self.residual_convs = nn.ModuleList([_conv3x3(num_residual_feat, num_residual_feat) for _ in range(num_block)])
        self.add_residual_convs = nn.ModuleList([_conv3x3(num_residual_feat, num_feat) for _ in range(num_block)])
        self.conv_last = _conv3x3(num_feat, num_sub_pixels)
        self.conv_residual_last = _conv3x3(num_residual_feat, num_sub_pixels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """He initialisation of the backbone, zero for its last conv; the residual stream repeats the pixels.

        So the network starts as nearest-neighbour upsampling.

        Residual channels beyond num_in_ch start as random features of the input that reach neither the backbone nor the
        output yet. At zero they would stay there: a ReLU at zero has no gradient.
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.conv_last.weight)
        colors = self.conv_first.in_channels
        self.conv_residual_first.weight[:colors] = 0
        self.conv_residual_first.weight[:colors, :, 1, 1].fill_diagonal_(1)
        for conv in self.residual_convs:
            nn.init.dirac_(conv.weight)
        for conv in (*self.add_residual_convs, self.conv_residual_last):
            nn.init.zeros_(conv.weight)
        sub_pixels = torch.eye(colors).repeat_interleave(self.upscale**2, dim=0)
        self.conv_residual_last.weight[:, :colors, 1, 1] = sub_pixels

    def residual_parameters(self):
        """Parameters of the residual stream and of what it adds to the backbone.

        Returns:
            list[Parameter]: None after switch_to_deploy.
        """
        return [param for name, param in self.named_parameters() if 'residual' in name]

    @property
    def deployed(self):
        """Whether switch_to_deploy has been called."""
        return not hasattr(self, 'residual_convs')

    def plain_layers(self):
        """The streams as one network of plain convs with ReLUs between them, the residual channels last.

        Paper: Eq. 8 and Eq. 9.

        Returns:
            list[tuple[Tensor, Tensor]]: Weight and bias of each conv; the last is followed by the pixel shuffle.
        """
        convs = [self.conv_first, *self.backbone_convs, self.conv_last]
        if self.deployed:
            return [(conv.weight, conv.bias) for conv in convs]
        first, last = self.conv_residual_first, self.conv_residual_last
        layers = [(torch.cat([self.conv_first.weight, first.weight]), torch.cat([self.conv_first.bias, first.bias]))]
        for conv, residual, add in zip(self.backbone_convs, self.residual_convs, self.add_residual_convs):
            upper = torch.cat([conv.weight, add.weight], dim=1)
            # the backbone adds nothing to the residual stream
            lower = F.pad(residual.weight, (0, 0, 0, 0, conv.in_channels, 0))
            layers.append((torch.cat([upper, lower]), torch.cat([conv.bias + add.bias, residual.bias])))
        layers.append((torch.cat([self.conv_last.weight, last.weight], dim=1), self.conv_last.bias + last.bias))
        return layers

    @torch.no_grad()
    def switch_to_deploy(self):
        """Replaces the streams, in place, by their plain convs: for inference, the weights are copied."""
        if self.deployed:
            return
        convs = []
        for weight, bias in self.plain_layers():
            # without initialisation, which would draw random numbers
            conv = nn.utils.skip_init(
                nn.Conv2d, *reversed(weight.shape[:2]), 3, padding=1, device=weight.device, dtype=weight.dtype)
            conv.weight.copy_(weight)
            conv.bias.copy_(bias)
            convs.append(conv)
        self.conv_first, *backbone, self.conv_last = convs
        self.backbone_convs = nn.ModuleList(backbone)
        for name in ('conv_residual_first', 'residual_convs', 'add_residual_convs', 'conv_residual_last'):
            delattr(self, name)

    def forward(self, x, return_residual=False):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].
            return_residual (bool): Whether to return the output of the residual stream alone too. Default: False.

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1]; or a tuple of two of them.
        """
        if self.deployed:
            if return_residual:
                raise RuntimeError('ETDS: after switch_to_deploy there is no residual stream to return.')
            out = F.relu(self.conv_first(x), inplace=True)
            for conv in self.backbone_convs:
                out = F.relu(conv(out), inplace=True)
            return F.pixel_shuffle(self.conv_last(out), self.upscale)

        out = F.relu(self.conv_first(x), inplace=True)
        residual = F.relu(self.conv_residual_first(x), inplace=True)
        for conv, residual_conv, add_conv in zip(self.backbone_convs, self.residual_convs, self.add_residual_convs):
            out = F.relu(conv(out) + add_conv(residual), inplace=True)
            residual = F.relu(residual_conv(residual), inplace=True)
        residual = F.pixel_shuffle(self.conv_residual_last(residual), self.upscale)
        out = F.pixel_shuffle(self.conv_last(out), self.upscale) + residual
        return (out, residual) if return_residual else out
