import torch
from collections import OrderedDict

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.engine import PRECISIONS
from ..options import OptionError
from .fast_options import check_options
from .self_describing import SelfDescribing


class FastTraining:
    """Part of a model that trains in a chosen precision and memory layout.

    It reads train.precision ('float32' | 'bfloat16' | 'float16', by autocast; default: 'float32') and
    train.channels_last (default: True).
    """

    def memory_format(self):
        return torch.channels_last if self.opt['train'].get('channels_last', True) else torch.contiguous_format

    def autocast(self):
        precision = PRECISIONS[self.opt['train'].get('precision', 'float32')]
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)

    def patches(self):
        """LQ and GT of the batch, in the memory layout that is trained in."""
        return tuple(images.contiguous(memory_format=self.memory_format()) for images in (self.lq, self.gt))

    def model_to_device(self, net):
        if self.is_train:
            if self.opt['num_gpu'] > 1 and not self.opt['dist']:
                for key, plain_value in (('precision', 'float32'), ('compile', False)):
                    if self.opt['train'].get(key, plain_value) != plain_value:  # DataParallel's threads ignore them
                        raise OptionError(
                            f'train.{key}', f'{self.opt["train"][key]} on {self.opt["num_gpu"]} GPUs needs a process '
                            'for each: bash scripts/dist_train.sh, or num_gpu: 1')
            net = net.to(memory_format=self.memory_format())
        return super(FastTraining, self).model_to_device(net)


@MODEL_REGISTRY.register()
class FastSRModel(FastTraining, SelfDescribing, SRModel):
    """SRModel that trains faster, and whose checkpoints say what network they are of. For one branch, or any network.

    Beyond SRModel's options it knows:
        train.precision (str): 'float32' | 'bfloat16' (autocast). Default: 'float32'.
        train.channels_last (bool): Memory layout in training. Default: True.
    """

    check_options = staticmethod(check_options)

    def compute_losses(self):
        """The losses of a batch by their name in the log; called under autocast."""
        lq, gt = self.patches()
        with self.autocast():
            self.output = self.net_g(lq)
        return OrderedDict(l_pix=self.cri_pix(self.output.float(), gt))

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        losses = self.compute_losses()
        sum(losses.values()).backward()
        self.step_optimizer(current_iter)

        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def step_optimizer(self, current_iter):
        self.optimizer_g.step()
