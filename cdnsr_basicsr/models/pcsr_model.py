import sys
import torch
from collections import OrderedDict

from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.difficulty_map import draw_difficulty_map
from ..inference.pixel_engine import PixelUpscaler, route
from .cdnsr_model import map_path
from .pcsr_options import check_options
from .self_describing import SelfDescribing


@MODEL_REGISTRY.register()
class PCSRModel(SelfDescribing, SRModel):
    """PCSR: trains backbone and heavy sampler, then light sampler and classifier; validates with each pixel routed.

    Paper: Accelerating Image Super-Resolution Networks with Pixel-Level Classification (ECCV 2024).

    Beyond SRModel's options it knows:
        train.phase (int): 0: backbone and heavy sampler alone; the others do not exist yet. 1: the mixture of both
            samplers. Default: 1.
        train.freeze (list[str]): Parts that stay as they are in phase 1: backbone, heavy. Default: [].
        train.average_opt: AverageLoss of the pixels' probabilities, in phase 1.
        routing.k (float), routing.adaptive (bool), routing.refinement (bool), routing.budget (float): How pixels are
            routed in validation; see PCSR and PixelUpscaler. Default: 0, false, true, none.
        tile.patch_size, tile.step (int): Tiles of validation, in LR pixels. Default: 128 and patch_size - 12.
        val.save_map (bool): Whether to save the difficulty map beside each image. Default: False.
    """

    def __init__(self, opt):
        if opt['is_train']:  # checkpoints say which parts the network has
            opt = dict(opt, network_g=dict(opt['network_g'], phase=opt['train'].get('phase', 1)))
        if opt.get('val'):  # progress is for eyes, not for log files
            opt['val'].setdefault('pbar', opt['rank'] == 0 and sys.stderr.isatty())
        super(PCSRModel, self).__init__(opt)

    check_options = staticmethod(check_options)

    def model_to_device(self, net):
        if self.is_train:
            # freeze before DistributedDataParallel looks which parameters it has to synchronise
            for part in self.opt['train'].get('freeze') or []:
                getattr(net, part).requires_grad_(False)
            net = net.to(memory_format=torch.channels_last)
        return super(PCSRModel, self).model_to_device(net)

    def init_training_settings(self):
        average_opt = self.opt['train'].get('average_opt')
        self.cri_average = build_loss(average_opt).to(self.device) if average_opt else None
        super(PCSRModel, self).init_training_settings()

    def setup_optimizers(self):
        # SRModel's would warn once for every frozen parameter
        optim_opt = dict(self.opt['train']['optim_g'])
        params = [param for param in self.net_g.parameters() if param.requires_grad]
        self.optimizer_g = self.get_optimizer(optim_opt.pop('type'), params, **optim_opt)
        self.optimizers.append(self.optimizer_g)

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        lq = self.lq.contiguous(memory_format=torch.channels_last)
        routing = None
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
        self.log_dict = self.reduce_loss_dict(OrderedDict((name, value.detach()) for name, value in log.items()))
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _tested_net(self):
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def test(self):
        net, routing, tile = self._tested_net(), self.opt.get('routing') or {}, self.opt.get('tile') or {}
        route(net, routing)
        if getattr(self, 'upscaler', None) is None or self.upscaler.net is not net:
            self.upscaler = PixelUpscaler(net, **tile, budget=routing.get('budget'))
        upscaled = self.upscaler.upscale(self.lq)
        self.output = upscaled.image
        if hasattr(self, 'routing_stats'):
            self._record(upscaled)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        dataset_name = dataloader.dataset.opt['name']
        self.validated = (dataset_name, current_iter)
        if getattr(self, 'upscaler', None) is not None:
            self.upscaler.refresh()  # fused optimizers leave the versions of the weights alone
        self.routing_stats = dict(counts=[0] * len(self._tested_net().samplers), cost=0., pixels=0)
        super(PCSRModel, self).nondist_validation(dataloader, current_iter, tb_logger, save_img)
        self._log_routing(tb_logger)
        del self.routing_stats

    def _record(self, upscaled):
        """Adds one validated image to the statistics, and saves its difficulty map if asked to."""
        stats, pixels = self.routing_stats, sum(upscaled.counts)
        stats['counts'] = [total + more for total, more in zip(stats['counts'], upscaled.counts)]
        stats['cost'] += upscaled.cost * pixels
        stats['pixels'] += pixels
        if self.opt['val'].get('save_map'):
            class_map = upscaled.plan.class_map().numpy()
            picture = draw_difficulty_map(tensor2img([self.output]), class_map, len(upscaled.counts))
            imwrite(picture, map_path(self.opt, self.lq_path[0], *self.validated))

    def feed_data(self, data):
        super(PCSRModel, self).feed_data(data)
        self.lq_path = data.get('lq_path')

    def _log_routing(self, tb_logger):
        (dataset_name, current_iter), stats = self.validated, self.routing_stats
        scalars = {'cost': stats['cost'] / max(stats['pixels'], 1)}
        message = (f'Routing {dataset_name}\n\t # cost: {scalars["cost"]:.4f} of the heavy sampler on whole images, '
                   'classifier and tile overlap included\n')
        for name, count in zip(('light', 'heavy')[-len(stats['counts']):], stats['counts']):
            share = count / max(stats['pixels'], 1)
            message += f'\t # {name}: {100 * share:.1f} % ({count} pixels)\n'
            scalars[f'share_{name}'] = share
        get_root_logger().info(message)
        if tb_logger:
            for name, value in scalars.items():
                tb_logger.add_scalar(f'routing/{dataset_name}/{name}', value, current_iter)
