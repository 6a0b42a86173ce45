from basicsr.utils.registry import MODEL_REGISTRY
from .etds_options import check_options
from .fast_training import FastSRModel


@MODEL_REGISTRY.register()
class ETDSModel(FastSRModel):
    """ETDS: trains both streams, the residual one by a loss of its own and later than the other.

    Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).

    Beyond FastSRModel's options it knows:
        train.residual_opt: Pixel loss of the residual stream's output, alpha of Eq. 15 being its loss_weight.
            Default: none.
        train.residual_freeze_iter (int): For so many iterations the residual stream stays as it is. Default: 0.
    """

    check_options = staticmethod(check_options)

    def init_training_settings(self):
        self.cri_residual = self.build_loss('residual')
        super(ETDSModel, self).init_training_settings()

    def compute_losses(self, current_iter):
        lq, gt = self.patches()
        with self.autocast():
            self.output, residual = self.net_g(lq, return_residual=True)
        losses = self.output_losses(lq, gt)
        if self.cri_residual is not None:
            losses['l_residual'] = self.cri_residual(residual.float(), gt)
        return losses

    def step_optimizer(self, current_iter):
        if current_iter <= self.opt['train'].get('residual_freeze_iter', 0):
            # DistributedDataParallel has to see all gradients; without one, the optimizer leaves a parameter, its decay
            # and its moments alone
            for param in self.get_bare_model(self.net_g).residual_parameters():
                param.grad = None
        super(ETDSModel, self).step_optimizer(current_iter)
