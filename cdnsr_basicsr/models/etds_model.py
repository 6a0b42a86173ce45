from collections import OrderedDict

from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from .etds_options import check_options
from .self_describing import SelfDescribing


@MODEL_REGISTRY.register()
class ETDSModel(SelfDescribing, SRModel):
    """ETDS: trains both streams, the residual one by a loss of its own and later than the other.

    Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).

    Beyond SRModel's options it knows:
        train.residual_opt: Pixel loss of the residual stream's output, alpha of Eq. 15 being its loss_weight.
            Default: none.
        train.residual_freeze_iter (int): For so many iterations the residual stream stays as it is. Default: 0.
    """

    check_options = staticmethod(check_options)

    def init_training_settings(self):
        residual_opt = self.opt['train'].get('residual_opt')
        self.cri_residual = build_loss(residual_opt).to(self.device) if residual_opt else None
        super(ETDSModel, self).init_training_settings()

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        self.output, residual = self.net_g(self.lq, return_residual=True)
        losses = OrderedDict(l_pix=self.cri_pix(self.output, self.gt))
        if self.cri_residual is not None:
            losses['l_residual'] = self.cri_residual(residual, self.gt)
        sum(losses.values()).backward()
        if current_iter <= self.opt['train'].get('residual_freeze_iter', 0):
            # DistributedDataParallel has to see all gradients; without one, the optimizer leaves a parameter, its decay
            # and its moments alone
            for param in self.get_bare_model(self.net_g).residual_parameters():
                param.grad = None
        self.optimizer_g.step()

        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
