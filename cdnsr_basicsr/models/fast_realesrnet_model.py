import torch

from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.tiling import to_device
from .degradation import BLURS, Degradation
from .fast_training import FastSRModel
from .photo_options import PhotoFile, check_options


class PairPool:
    """Pairs that have been degraded before, of which batches are mixed; RealESRNetModel says why. Of 8 bits a value.

    Args:
        size (int): Number of pairs.
    """

    def __init__(self, size):
        self.size, self.count, self.pairs = size, 0, None

    def exchange(self, *batch):
        """Takes a batch in, and gives another out for it once the pool is full.

        Args:
            batch (tuple[Tensor]): LQ and GT, of shapes (b, c, h, w), in [0, 1].

        Returns:
            tuple[Tensor, Tensor]: LQ and GT, of the same shapes.
        """
        if self.pairs is None:
            self.pairs = [images.new_zeros(self.size, *images.shape[1:], dtype=torch.uint8) for images in batch]
        given = [(255 * images).round().byte() for images in batch]
        count = len(given[0])
        full = self.count + count > self.size
        places = torch.randperm(self.count)[:count] if full else torch.arange(self.count, self.count + count)
        places = to_device(places, given[0].device)
        if full:
            batch = [images[places] / 255. for images in self.pairs]
        else:
            self.count += count
        for images, new in zip(self.pairs, given):
            images[places] = new
        return tuple(batch)

    def state(self):
        """What it holds, for `load`."""
        return {} if self.pairs is None else {'count': self.count, 'pairs': [images.cpu() for images in self.pairs]}

    def load(self, state, device):
        """Goes on with another pool's pairs; without any it is filled again, and so if they are of another size.

        Args:
            state (dict): What `state` has returned, or nothing.
            device (torch.device): Where batches are.
        """
        if state and len(state['pairs'][0]) == self.size:
            self.count, self.pairs = state['count'], [images.to(device) for images in state['pairs']]


@MODEL_REGISTRY.register()
class FastRealESRNetModel(FastSRModel):
    """FastSRModel that makes the LQ itself: from photographs, by RealESRNetModel's degradation, on any device.

    Batches that have an LQ already, as in validation, are taken as they are.

    What its option files may say beyond FastSRModel's: PhotoFile, and docs/Options.md.
    """

    option_file = PhotoFile
    check_options = staticmethod(check_options)

    def init_training_settings(self):
        super(FastRealESRNetModel, self).init_training_settings()
        self.degradation = Degradation(self.opt, self.device, self.opt['datasets']['train']['gt_size'])
        self.pool = PairPool(self.settings.queue_size)

    def feed_data(self, data):
        if 'lq' not in data:
            lq, gt = self.degradation({name: self.to_device(data[name]) for name in ('gt', *BLURS)})
            data = dict(zip(('lq', 'gt'), self.pool.exchange(lq, gt)))
        super(FastRealESRNetModel, self).feed_data(data)

    def own_process_state(self):
        return dict(super(FastRealESRNetModel, self).own_process_state(), pool=self.pool.state())

    def resume_own_state(self, state, process_state):
        super(FastRealESRNetModel, self).resume_own_state(state, process_state)
        self.pool.load(process_state.get('pool'), self.device)
