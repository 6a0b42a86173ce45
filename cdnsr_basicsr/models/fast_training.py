import math
import sys
import torch
from collections import OrderedDict
from functools import cached_property
from torch.optim.swa_utils import get_ema_multi_avg_fn

from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.network import PRECISIONS, geometry, run_padded
from ..options import OptionError
from ..options.schema import filled
from .fast_options import FastFile, check_options
from .muon import Muon
from .self_describing import SelfDescribing
from .shared_validation import SharedValidation
from .training_state import CompleteState


class FastTraining(CompleteState, SharedValidation, SelfDescribing):
    """Base of all models of this package, in front of SRModel: they train in a chosen precision and memory layout,
    share validation among processes, and save complete states and self-describing checkpoints.

    A model computes its losses in `compute_losses`, and may do something to their gradients in `step_optimizer`.
    `option_file` is the dataclass of what its option files may say. Nothing here waits for a GPU, until the log is
    asked for.
    """
    option_file = FastFile

    def __init__(self, opt):
        if opt.get('val'):  # progress is for eyes, not for log files
            opt['val'].setdefault('pbar', opt['rank'] == 0 and sys.stderr.isatty())
        self.loss_sums = self.taught = None
        super(FastTraining, self).__init__(opt)

    @cached_property
    def settings(self):
        """The settings of the option file, with defaults for the rest."""
        return filled(self.option_file, self.opt)

    def to_device(self, tensor):
        """Part of a batch, where the network is."""
        return tensor.to(self.device, non_blocking=True)

    def feed_data(self, data):
        moved = {key: self.to_device(data[key]) for key in ('lq', 'gt', 'teacher') if key in data}
        super(FastTraining, self).feed_data(dict(data, **moved))
        self.lq_path, self.taught = data.get('lq_path'), moved.get('teacher')

    def init_training_settings(self):
        super(FastTraining, self).init_training_settings()
        if hasattr(self, 'net_g_ema'):
            self.net_g_ema.to(memory_format=self.memory_format())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.train.precision == 'float16')

    def build_loss(self, name):
        """The loss of train.NAME_opt; None without one."""
        loss_opt = self.opt['train'].get(f'{name}_opt')
        return build_loss(loss_opt).to(self.device) if loss_opt else None

    def check_patches(self, multiple, where):
        """Refuses training patches of a size that a network cannot process.

        Args:
            multiple (int): What the sides of its images must be multiples of.
            where (str): The network's place in the option file.
        """
        gt_size = self.opt.get('datasets', {}).get('train', {}).get('gt_size')
        side, scale = (gt_size or 0) // self.opt['scale'], self.opt['scale']
        if side % multiple:
            nearest = [max(1, side // multiple + more) * multiple * scale for more in (0, 1)]
            raise OptionError(
                'datasets.train.gt_size', f'{gt_size} makes LQ patches of {side} pixels, but {where} takes multiples '
                f'of {multiple} only, such as gt_size {" or ".join(str(size) for size in sorted(set(nearest)))}')

    def check_scale(self, net, where):
        """Refuses a network of another scale, or one that the training patches do not fit.

        Args:
            net (nn.Module): The network.
            where (str): Its place in the option file.
        """
        try:
            scale, _, multiple = geometry(net)
        except ValueError as error:
            raise OptionError(where, str(error)) from error
        if scale != self.opt['scale']:
            raise OptionError(where, f"enlarges {scale} times; expected a network of scale {self.opt['scale']}")
        if self.is_train:
            self.check_patches(multiple, where)

    def load_pretrained(self, net, path, label):
        """Loads the weights of path.pretrain_network_LABEL or the like."""
        self.load_network(net, path, self.opt['path'].get(f'strict_load_{label}', True), 'params_ema')

    def load_teacher(self):
        """The network that teaches, frozen; None without network_t."""
        if 'network_t' not in self.opt:
            return None
        net_t = build_network(self.opt['network_t'])
        self.check_scale(net_t, 'network_t')
        self.load_pretrained(net_t, self.opt['path']['pretrain_network_t'], 't')
        return net_t.to(self.device, memory_format=self.memory_format()).requires_grad_(False).eval()

    def teach(self, lq):
        """The teacher's output for the batch, of shape (b, c, h*scale, w*scale); None without a teacher."""
        if self.net_t is None:
            return self.taught
        with torch.no_grad(), self.autocast():
            return self.net_t(lq).float()

    def trained_parameters(self):
        """Groups of parameters for the optimizer."""
        return [[param for param in self.net_g.parameters() if param.requires_grad]]

    def setup_optimizers(self):
        # SRModel's would warn once for every frozen parameter
        optim_opt = dict(self.opt['train']['optim_g'])
        groups = [{'params': params} for params in self.trained_parameters() if params]
        self.optimizer_g = self.get_optimizer(optim_opt.pop('type'), groups, **optim_opt)
        self.optimizers.append(self.optimizer_g)

    def compute_losses(self, current_iter):
        """Runs the network on a batch.

        Args:
            current_iter (int): Current iteration, from 1.

        Returns:
            OrderedDict[str, Tensor]: Scalars by their names in the log. The sum of those that begin with l_ is
                minimised.
        """
        raise NotImplementedError

    def step_optimizer(self, current_iter):
        """Takes the optimizer's step, unless the gradients have overflowed in float16.

        Args:
            current_iter (int): Current iteration, from 1.
        """
        self.scaler.step(self.optimizer_g)
        self.scaler.update()

    def optimize_parameters(self, current_iter):
        """One training step; the same for all models.

        Args:
            current_iter (int): Current iteration, from 1.
        """
        self.optimizer_g.zero_grad()
        log = self.compute_losses(current_iter)
        self.scaler.scale(sum(value for name, value in log.items() if name.startswith('l_'))).backward()
        self.step_optimizer(current_iter)

        self.keep_log(log)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def model_ema(self, decay=0.999):
        """As BaseModel's, in a few operations for all parameters instead of two for each."""
        nets = (self.net_g_ema, self.get_bare_model(self.net_g))
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(*(list(net.parameters()) for net in nets), None)

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        """BasicSR's, but in one pass over the weights where torch has that; and Muon."""
        if optim_type == 'Muon':
            return Muon(params, lr, **kwargs)
        if optim_type in ('Adam', 'AdamW', 'SGD') and not kwargs.get('foreach'):
            kwargs.setdefault('fused', True)
        return super(FastTraining, self).get_optimizer(optim_type, params, lr, **kwargs)

    def keep_log(self, values):
        """Keeps the logged values of a step by name, on the device until they are needed."""
        self.step_log = OrderedDict((name, value.detach()) for name, value in values.items())
        losses = torch.stack([value.float() for name, value in self.step_log.items() if name.startswith('l_')])
        self.loss_sums = losses if self.loss_sums is None else self.loss_sums + losses

    def get_current_log(self):
        """What the last step has kept, as numbers; means over the processes. A loss that was not finite in one of the
        steps since the last time is not finite here.
        """
        names = [name for name in self.step_log if name.startswith('l_')]
        sums = {} if self.loss_sums is None else dict(zip(names, self.loss_sums))
        log = self.reduce_loss_dict({**self.step_log, **{f'sum of {name}': value for name, value in sums.items()}})
        for name in sums:
            if not math.isfinite(log.pop(f'sum of {name}')):
                log[name] = math.nan
        self.log_dict, self.loss_sums = log, None
        return self.log_dict

    def tested_net(self):
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def memory_format(self):
        return torch.channels_last if self.settings.train.channels_last else torch.contiguous_format

    def autocast(self):
        precision = PRECISIONS[self.settings.train.precision]
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
class FastSRModel(FastTraining, SRModel):
    """SRModel that trains faster, shares validation among processes, and saves self-describing checkpoints. For one
    branch, or any network.

    What its option files may say beyond SRModel's: FastFile, and docs/Options.md.
    """

    check_options = staticmethod(check_options)

    def model_to_device(self, net):
        try:
            self.multiple = geometry(net)[2]
        except ValueError:  # its images have neither 3 channels nor 1: it is on its own, as in SRModel
            self.multiple = 1
        if self.is_train:
            self.check_patches(self.multiple, 'network_g')
        return super(FastSRModel, self).model_to_device(net)

    def init_training_settings(self):
        self.cri_teacher, self.net_t = self.build_loss('teacher'), self.load_teacher()
        super(FastSRModel, self).init_training_settings()

    def compute_losses(self, current_iter):
        lq, gt = self.patches()
        with self.autocast():
            self.output = self.net_g(lq)
        return self.output_losses(lq, gt)

    def output_losses(self, lq, gt):
        """The losses of self.output by their names in the log."""
        losses = OrderedDict(l_pix=self.cri_pix(self.output.float(), gt))
        if self.cri_teacher is not None:
            losses['l_teacher'] = self.cri_teacher(self.output.float(), self.teach(lq))
        return losses

    def test(self):
        # SRModel's goes through DistributedDataParallel, which would wait for processes that have other images
        net = self.tested_net()
        was_training = net.training
        self.output = run_padded(net.eval(), self.lq, self.opt['scale'], self.multiple)
        net.train(was_training)
