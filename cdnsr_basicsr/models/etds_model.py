from basicsr.utils.registry import MODEL_REGISTRY
from .etds_options import ETDSFile, check_options
from .fast_training import FastSRModel


@MODEL_REGISTRY.register()
class ETDSModel(FastSRModel):
    """ETDS: trains both streams, the residual one by a loss of its own and later than the other.

    Paper: Equivalent Transformation and Dual Stream Network Construction for Mobile Image Super-Resolution (CVPR 2023).

    What its option files may say beyond FastSRModel's: ETDSFile, and docs/Options.md.
    """

    option_file = ETDSFile
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
        if current_iter <= self.settings.train.residual_freeze_iter:
            # DistributedDataParallel has to see all gradients; without one, the optimizer leaves a parameter, its decay
            # and its moments alone
            for param in self.get_bare_model(self.net_g).residual_parameters():
                param.grad = None
        super(ETDSModel, self).step_optimizer(current_iter)
