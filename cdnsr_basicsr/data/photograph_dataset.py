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

CROPPED = 400  # RealESRGANDataset's crops, which smaller images are padded to
SHAPES = list_of(KERNELS, words=f'list of {KERNELS.words}')
SIGMAS = fitting(list_of(number(0.01, 100), 2, words='list of 2 numbers'), ordered, SMALLER_FIRST)
# Defaults are mild. A camera that misses the focus a little blurs by 0.2 to 1.2 pixels; Real-ESRGAN's 3 are for images
# that show nothing any more. What an app that shrinks adds is less than that.
# Lenses and motion blur by Gaussians, round and not; at such widths the other shapes hardly differ from them.
# Sinc filters, the ringing of strong sharpening, are rare in photographs.


def margin(scale):
    """How much larger than a patch an image is degraded: the patch may begin anywhere in a block of the last JPEG."""
    return 8 * scale


@dataclass
class Photographs(AnyData):
    """A dataset of GT and of the blur that RealESRNetModel's degradation starts from, as PhotographDataset makes it."""
    dataroot_gt: str = schema.key(..., word('path'), 'folder or LMDB of the GT')
    io_backend: Mapping = schema.key(..., typed('block: type disk, or lmdb'), 'what the images lie in')
    meta_info: Optional[str] = schema.key(None, word('path'), 'file that lists the images of a folder; ~: all of them')
    gt_size: int = schema.key(..., integer(1, CROPPED), 'side of the GT patches')
    use_hflip: bool = schema.key(True, FLAG, 'whether patches are flipped, either way')
    use_rot: bool = schema.key(True, FLAG, 'whether patches are turned')
    kernel_list: list = schema.key(('iso', 'aniso'), SHAPES, 'shapes of the first blur')
    kernel_prob: list = schema.key((0.6, 0.4), shares(), 'probability of each of kernel_list')
    blur_sigma: list = schema.key((0.2, 1.2), SIGMAS, 'width of the first blur, in GT pixels')
    betag_range: list = schema.key((0.5, 4), SIGMAS, 'exponents of generalized Gaussian kernels')
    betap_range: list = schema.key((1, 2), SIGMAS, 'exponents of plateau kernels')
    sinc_prob: float = schema.key(0.02, number(0, 1), 'probability of a sinc filter instead: ringing')
    kernel_list2: list = schema.key(('iso', 'aniso'), SHAPES, 'shapes of the second blur')
    kernel_prob2: list = schema.key((0.6, 0.4), shares(), 'probability of each of kernel_list2')
    blur_sigma2: list = schema.key((0.2, 0.8), SIGMAS, 'width of the second blur')
    betag_range2: list = schema.key((0.5, 4), SIGMAS, 'exponents of generalized Gaussian kernels')
    betap_range2: list = schema.key((1, 2), SIGMAS, 'exponents of plateau kernels')
    sinc_prob2: float = schema.key(0.02, number(0, 1), 'probability of a sinc filter instead')
    final_sinc_prob: float = schema.key(0.05, number(0, 1), 'probability of a sinc filter of the LQ at the end')
    blur_kernel_size: int = schema.key(21, integer(1, 2**16), 'is not read: kernels have 7 to 21 pixels')
    blur_kernel_size2: int = schema.key(21, integer(1, 2**16), 'is not read: kernels have 7 to 21 pixels')
    scale: Optional[float] = schema.key(None, word('number', 'number'), "set by BasicSR: the file's")
    phase: Optional[str] = schema.key(None, word('word'), 'set by BasicSR: train')


@DATASET_REGISTRY.register()
class PhotographDataset(RealESRGANDataset):
    """RealESRGANDataset with mild defaults for photographs, of patches that are not larger than what is degraded.

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
