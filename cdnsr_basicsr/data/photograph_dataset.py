import dataclasses
import random
from dataclasses import dataclass
from os import devnull
from typing import Mapping, Optional

from basicsr.data.realesrgan_dataset import RealESRGANDataset
from basicsr.utils import scandir
from basicsr.utils.registry import DATASET_REGISTRY
from ..options import OptionError, schema
from ..options.kinds import FLAG, fitting, integer, list_of, number, typed, word
from ..options.schema import AnyData, check_block, filled
from ..options.stock import KERNELS, SMALLER_FIRST, ordered, shares

CROPPED = 400  # side of RealESRGANDataset's crops, to which smaller images are padded
SHAPES = list_of(KERNELS, words=f'list of {KERNELS.words}')
SIGMAS = fitting(list_of(number(0.01, 100), 2, words='list of 2 numbers'), ordered, SMALLER_FIRST)
# Defaults are mild. A camera slightly out of focus blurs by 0.2 to 1.2 pixels; Real-ESRGAN's 3 pixels are for images
# without any visible detail. Apps that shrink an image add less blur than that.
# Lenses and motion blur like isotropic and anisotropic Gaussians; at such widths, other shapes hardly differ.
# Sinc filters (ringing from strong sharpening) are rare in photographs.


def margin(scale):
    """GT pixels by which a degraded image exceeds a patch, which may begin anywhere in a block of the last JPEG."""
    return 8 * scale


@dataclass
class Photographs(AnyData):
    """A dataset of GT images and blur kernels for RealESRNetModel's degradation, as PhotographDataset reads it."""
    dataroot_gt: str = schema.key(..., word('path'), 'folder or LMDB of the GT images')
    io_backend: Mapping = schema.key(..., typed('block: type disk, or lmdb'), 'how the images are stored')
    meta_info: Optional[str] = schema.key(None, word('path'), 'file that lists the images of a folder; ~: all of them')
    gt_size: int = schema.key(..., integer(1, CROPPED), 'side of the GT patches')
    use_hflip: bool = schema.key(True, FLAG, 'flip patches horizontally at random')
    use_rot: bool = schema.key(True, FLAG, 'rotate patches at random')
    kernel_list: list = schema.key(('iso', 'aniso'), SHAPES, 'shapes of the first blur')
    kernel_prob: list = schema.key((0.6, 0.4), shares(), 'probability of each of kernel_list')
    blur_sigma: list = schema.key((0.2, 1.2), SIGMAS, 'width of the first blur, in GT pixels')
    betag_range: list = schema.key((0.5, 4), SIGMAS, 'exponents of generalized Gaussian kernels')
    betap_range: list = schema.key((1, 2), SIGMAS, 'exponents of plateau kernels')
    sinc_prob: float = schema.key(0.02, number(0, 1), 'probability of a sinc filter (ringing) instead')
    kernel_list2: list = schema.key(('iso', 'aniso'), SHAPES, 'shapes of the second blur')
    kernel_prob2: list = schema.key((0.6, 0.4), shares(), 'probability of each of kernel_list2')
    blur_sigma2: list = schema.key((0.2, 0.8), SIGMAS, 'width of the second blur')
    betag_range2: list = schema.key((0.5, 4), SIGMAS, 'exponents of generalized Gaussian kernels')
    betap_range2: list = schema.key((1, 2), SIGMAS, 'exponents of plateau kernels')
    sinc_prob2: float = schema.key(0.02, number(0, 1), 'probability of a sinc filter instead')
    final_sinc_prob: float = schema.key(0.05, number(0, 1), 'probability of a final sinc filter on the LQ image')
    blur_kernel_size: int = schema.key(21, integer(1, 2**16), 'ignored: kernels have 7 to 21 pixels')
    blur_kernel_size2: int = schema.key(21, integer(1, 2**16), 'ignored: kernels have 7 to 21 pixels')
    scale: Optional[float] = schema.key(None, word('number', 'number'), "set by BasicSR: the option file's scale")
    phase: Optional[str] = schema.key(None, word('word'), 'set by BasicSR: train')


@DATASET_REGISTRY.register()
class PhotographDataset(RealESRGANDataset):
    """RealESRGANDataset with mild defaults for photographs, and with crops as small as the degradation allows.

    Args:
        opt (dict): Config for datasets, with the keys of Photographs.
    """

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Photographs) if field.default not in (..., None)
    }

    def __init__(self, opt):
        self.check_options(opt, f"datasets.{opt.get('name', '')}")
        opt = dict(dataclasses.asdict(filled(Photographs, opt)), io_backend=dict(opt['io_backend']))
        of_folder = opt['io_backend']['type'] == 'disk' and opt['meta_info'] is None
        super(PhotographDataset, self).__init__(dict(opt, meta_info=devnull) if of_folder else opt)
        if of_folder:
            self.paths = sorted(scandir(self.gt_folder, full_path=True))
        self.side = min(CROPPED, opt['gt_size'] + margin(opt['scale']))

    @staticmethod
    def check_options(opt, where):
        """Refuses unknown keys and values that no degradation has.

        Args:
            opt (dict): Dataset block.
            where (str): Its place in the option file, for messages.

        Raises:
            OptionError: For the first mistake found.
        """
        check_block(Photographs, opt, where, ('dataroot_gt', 'io_backend', 'gt_size'))
        block = filled(Photographs, opt)
        for number_ in ('', '2'):
            kinds, probs = (getattr(block, f'kernel_{name}{number_}') for name in ('list', 'prob'))
            if len(kinds) != len(probs):
                raise OptionError(
                    f'{where}.kernel_prob{number_}',
                    f'expected {len(kinds)} probabilities, one for each of kernel_list{number_}, but got '
                    f'{list(probs)}')

    def __getitem__(self, index):
        """
        Returns:
            dict: gt (Tensor) of shape (3, h, w), RGB in [0, 1], at most by `margin` larger than gt_size; kernel1,
                kernel2 and sinc_kernel (Tensor) of shape (21, 21); gt_path (str).
        """
        data = super(PhotographDataset, self).__getitem__(index)
        top, left = (random.randint(0, CROPPED - self.side) for _ in range(2))
        return dict(data, gt=data['gt'][:, top:top + self.side, left:left + self.side].contiguous())
