import torch
from collections import OrderedDict

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.network import route
from ..options.schema import filled
from .fast_training import FastTraining
from .pcsr_options import PCSRFile, PCSRTraining, check_options
from .routed_validation import RoutedValidation


@MODEL_REGISTRY.register()
class PCSRModel(RoutedValidation, FastTraining, SRModel):
    """PCSR: trains backbone and heavy sampler, then light sampler and classifier; validates with each pixel routed.

    Paper: Accelerating Image Super-Resolution Networks with Pixel-Level Classification (ECCV 2024).

    What its option files may say beyond SRModel's: PCSRFile, and docs/Options.md.
    """
    unit, parts, hardest = 'pixel', 'samplers', 'heavy sampler'

    def __init__(self, opt):
        if opt['is_train']:  # checkpoints say which parts the network has
            opt = dict(opt, network_g=dict(opt['network_g'], phase=filled(PCSRTraining, opt['train']).phase))
        super(PCSRModel, self).__init__(opt)

    option_file = PCSRFile
    check_options = staticmethod(check_options)

    def model_to_device(self, net):
        if self.is_train:
            # freeze before DistributedDataParallel looks which parameters it has to synchronise
            for part in self.settings.train.freeze:
                getattr(net, part).requires_grad_(False)
        return super(PCSRModel, self).model_to_device(net)

    def init_training_settings(self):
        self.cri_average = self.build_loss('average')
        super(PCSRModel, self).init_training_settings()

    def compute_losses(self, current_iter):
        lq, routing = self.patches()[0], None
        if self.opt['network_g']['phase'] == 0:
            self.output = self.net_g(lq)
        else:
            self.output, routing = self.net_g(lq, return_routing=True)
        log = OrderedDict(l_pix=self.cri_pix(self.output, self.gt))
        if self.cri_average:
            probability = routing.heavy.flatten()
            log['l_average'] = self.cri_average(torch.stack([1 - probability, probability], dim=1))
        if routing is not None:
            log['share_heavy'] = (routing.margin > 0).float().mean()
        return log

    def upscaler(self, net):
        routing = self.settings.routing
        route(net, routing)
        return super(PCSRModel, self).upscaler(net, budget=routing.budget)

    def class_names(self):
        return {name: name for name in ('light', 'heavy')[-len(self.tested_net().samplers):]}

    def class_costs(self):
        macs = torch.tensor(self.upscaler(self.tested_net()).sampler_macs, dtype=torch.float32)
        return macs / macs.max().clamp(min=1)
