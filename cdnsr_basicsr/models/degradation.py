import cv2
import numpy as np
import torch
from dataclasses import asdict, dataclass
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.utils import DiffJPEG, USMSharp
from ..options.kinds import FLAG, fitting, list_of, number
from ..options.schema import filled, key
from ..options.stock import SMALLER_FIRST, ordered, shares

BLURS = ('kernel1', 'kernel2', 'sinc_kernel')
UNSEEN = 1e-3  # fraction of a blur kernel's weights at its rim that is dropped on CPUs: a quarter of a grey level
FACTORS = fitting(
    list_of(number(0.05, 16), 2, words='list of 2 numbers'), lambda span: span[0] <= 1 <= span[1],
    'one number up to 1 and one from 1 on')


def span(low, high):
    """Two numbers in order."""
    return fitting(
        list_of(number(low, high), 2, words=f'list of 2 numbers from {low} to {high}'), ordered, SMALLER_FIRST)


@dataclass
class Degradations:
    """Strengths of RealESRNetModel's degradation. The defaults suit photographs from phones and the web; Real-ESRGAN's
    own values are for old and damaged ones.
    """
    # apps shrink more often than they enlarge, by much less than the scale that the network undoes
    resize_prob: list = key((0.2, 0.5, 0.3), shares(3), 'probabilities of up, down and keep in the first resize')
    resize_range: list = key((0.7, 1.2), FACTORS, 'factors of the first resize')
    # after a camera's own denoising, noise is nearly the same in light and dark areas
    gaussian_noise_prob: float = key(0.7, number(0, 1), 'probability of Gaussian noise; otherwise Poisson noise')
    noise_range: list = key((0, 8), span(0, 255), 'sigma of the Gaussian noise, in grey levels of 255')
    # 0.6 to 5.6 grey levels in middle grey
    poisson_scale_range: list = key((0.05, 0.5), span(0, 100),
                                    "strength of the Poisson noise; 1: that of counts from 0 to 255")
    gray_noise_prob: float = key(0.4, number(0, 1), 'probability that the noise is the same in all channels')
    # qualities of phones (90 and more), editors (80) and websites (75, some 60)
    jpeg_range: list = key((50, 95), span(1, 100), 'quality of the first JPEG')
    # the second degradation is that of a messenger or website: it shrinks the image and saves it again
    second_blur_prob: float = key(0.3, number(0, 1), 'probability of the second blur')
    resize_prob2: list = key((0.2, 0.4, 0.4), shares(3), 'as resize_prob, in the second resize')
    resize_range2: list = key((0.8, 1.2), FACTORS, 'factors of the second resize, in addition to the scale')
    gaussian_noise_prob2: float = key(0.7, number(0, 1), 'as gaussian_noise_prob')
    # noise in the small LQ image, which is not averaged afterwards
    noise_range2: list = key((0, 4), span(0, 255), 'as noise_range')
    poisson_scale_range2: list = key((0.05, 0.3), span(0, 100), 'as poisson_scale_range')
    gray_noise_prob2: float = key(0.4, number(0, 1), 'as gray_noise_prob')
    jpeg_range2: list = key((70, 95), span(1, 100), 'quality of the last JPEG')
    # with sharpened GT, the network learns to sharpen, at the expense of PSNR
    gt_usm: bool = key(False, FLAG, 'sharpen the GT (unsharp masking)')


class Jpeg:
    """OpenCV's JPEG compression in place of DiffJPEG; faster on a CPU."""

    def __call__(self, images, quality):
        """
        Args:
            images (Tensor): of shape (b, 3, h, w), RGB in [0, 1], on the CPU.
            quality (Tensor): of shape (b, ), 1 to 100.

        Returns:
            Tensor: What they are after saving and loading, of the same shape.
        """
        saved = []
        for pixels, value in zip((images * 255).round().byte().permute(0, 2, 3, 1).numpy(), quality.round().tolist()):
            _, data = cv2.imencode('.jpg', np.ascontiguousarray(pixels[..., ::-1]),
                                   [cv2.IMWRITE_JPEG_QUALITY, int(value)])
            saved.append(torch.from_numpy(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].copy()))
        return torch.stack(saved).permute(0, 3, 1, 2).contiguous() / 255.


def trimmed(kernels):
    """Crops blur kernels by the rim that makes no difference.

    Args:
        kernels (Tensor): of shape (b, k, k), with odd k; the sum of each is 1.

    Returns:
        Tensor: of shape (b, n, n), with odd n up to k; the sum of each is 1.
    """
    side = kernels.shape[-1]
    for rim in range(side // 2, -1, -1):
        inner = kernels[:, rim:side - rim, rim:side - rim]
        if (kernels.abs().sum((1, 2)) - inner.abs().sum((1, 2))).max() < UNSEEN:
            break
    return inner / inner.sum((1, 2), keepdim=True)


class InPlace(TorchFunctionMode):
    """Makes resizes use the ratio of the sides, so that image content does not shift.

    By a factor alone, what is left of a last pixel is cut off, and the rest is stretched when it is resized back: at
    the far edge, GT and LQ are then more than a GT pixel apart.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.interpolate and kwargs.get('scale_factor') is not None:
            kwargs['recompute_scale_factor'] = True
        return func(*args, **kwargs)


class Degradation(RealESRNetModel):
    """RealESRNetModel's degradation without its network and pool of pairs.

    Args:
        opt (dict): Content of an option file, with any of the keys of Degradations.
        device (torch.device): Where it runs. On CPUs, JPEG is OpenCV's, and kernels are cropped by their rim.
        gt_size (int): Side of the GT patches that are cut afterwards.
    """

    def __init__(self, opt, device, gt_size):
        self.opt = dict(asdict(filled(Degradations, opt)), scale=opt['scale'], gt_size=gt_size)
        self.opt['num_gpu'] = int(device.type == 'cuda')
        self.device, self.is_train = device, True
        self.jpeger = Jpeg() if device.type == 'cpu' else DiffJPEG(differentiable=False).to(device)
        self.usm_sharpener = USMSharp().to(device)

    def _dequeue_and_enqueue(self):
        pass

    def __call__(self, data):
        """
        Args:
            data (dict): A batch of RealESRGANDataset or PhotographDataset.

        Returns:
            tuple[Tensor, Tensor]: LQ of shape (b, 3, h, w) and GT of shape (b, 3, h*scale, w*scale), in [0, 1].
        """
        if self.device.type == 'cpu':
            data = dict(data, **{name: trimmed(data[name]) for name in BLURS})
        with InPlace():
            self.feed_data(data)
        return self.lq, self.gt
