import torch
from collections import OrderedDict
from dataclasses import asdict

from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.difficulty_map import draw_difficulty_map
from ..inference.pixel_engine import PixelUpscaler, route
from ..options.schema import filled
from .cdnsr_model import map_path
from .fast_training import FastTraining
from .pcsr_options import PCSRFile, PCSRTraining, check_options


@MODEL_REGISTRY.register()
class PCSRModel(FastTraining, SRModel):
    """PCSR: trains backbone and heavy sampler, then light sampler and classifier; validates with each pixel routed.

    Paper: Accelerating Image Super-Resolution Networks with Pixel-Level Classification (ECCV 2024).

    What its option files may say beyond SRModel's: PCSRFile, and docs/Options.md.
    """

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
        average_opt = self.opt['train'].get('average_opt')
        self.cri_average = build_loss(average_opt).to(self.device) if average_opt else None
        super(PCSRModel, self).init_training_settings()

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        lq, routing = self.patches()[0], None
        if self.opt['network_g']['phase'] == 0:
            self.output = self.net_g(lq)
        else:
            self.output, routing = self.net_g(lq, return_routing=True)
        log = OrderedDict(l_pix=self.cri_pix(self.output, self.gt))
        if self.cri_average:
            probability = routing.heavy.flatten()
            log['l_average'] = self.cri_average(torch.stack([1 - probability, probability], dim=1))
        sum(log.values()).backward()
        self.optimizer_g.step()

        if routing is not None:
            log['share_heavy'] = (routing.margin > 0).float().mean()
        self.keep_log(log)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self):
        net, routing, tile = self.tested_net(), self.settings.routing, self.settings.tile
        route(net, asdict(routing))
        if getattr(self, 'upscaler', None) is None or self.upscaler.net is not net:
            self.upscaler = PixelUpscaler(net, tile.patch_size, tile.step, routing.budget)
        upscaled = self.upscaler.upscale(self.lq)
        self.output = upscaled.image
        if hasattr(self, 'routing_stats'):
            self._record(upscaled)

    def begin_validation(self, dataset_name, current_iter, tb_logger):
        super(PCSRModel, self).begin_validation(dataset_name, current_iter, tb_logger)
        if getattr(self, 'upscaler', None) is not None:
            self.upscaler.refresh()  # fused optimizers leave the versions of the weights alone
        counts = torch.zeros(len(self.tested_net().samplers), dtype=torch.float64)
        self.routing_stats = dict(counts=counts, cost=0., pixels=0)

    def _record(self, upscaled):
        """Adds one validated image to the statistics, and saves its difficulty map if asked to."""
        stats, pixels = self.routing_stats, sum(upscaled.counts)
        stats['counts'] += torch.tensor(upscaled.counts)
        stats['cost'] += upscaled.cost * pixels
        stats['pixels'] += pixels
        if self.settings.val.save_map:
            class_map = upscaled.plan.class_map().numpy()
            picture = draw_difficulty_map(tensor2img([self.output]), class_map, len(upscaled.counts))
            imwrite(picture, map_path(self.opt, self.lq_path[0], *self.validated[:2]))

    def log_routing(self):
        (dataset_name, current_iter, tb_logger), stats = self.validated, self.routing_stats
        counts = stats['counts'].reshape(-1).tolist()
        scalars = {'cost': float(stats['cost'] / max(stats['pixels'], 1))}
        message = (f'Routing {dataset_name}\n\t # cost: {scalars["cost"]:.4f} of the heavy sampler on whole images, '
                   'classifier and tile overlap included\n')
        for name, count in zip(('light', 'heavy')[-len(counts):], counts):
            share = float(count / max(stats['pixels'], 1))
            message += f'\t # {name}: {100 * share:.1f} % ({count:.0f} pixels)\n'
            scalars[f'share_{name}'] = share
        get_root_logger().info(message)
        if tb_logger:
            for name, value in scalars.items():
                tb_logger.add_scalar(f'routing/{dataset_name}/{name}', value, current_iter)
