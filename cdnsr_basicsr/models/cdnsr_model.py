import cv2
import torch
from collections import OrderedDict
from os import path as osp

from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.difficulty_map import draw_difficulty_map, in_bgr
from ..inference.engine import RoutedUpscaler
from ..losses import VGG19Features, squared_error
from ..options import OptionError
from .cdnsr_options import DISTILLATION_LOSSES, LOSSES, CDNSRFile, check_options
from .collapse_guard import CollapseGuard, class_counts, routing_entropy, softened
from .distillation import Distillation
from .fast_training import FastTraining

NEED_NO_IMAGES = ('class', 'average', 'flops', 'label')  # losses of what the classifier says alone
TB_IMAGES = 4  # of each validation set
TB_SIDE = 512  # largest side of an image in TensorBoard, in pixels


def map_path(opt, lq_path, dataset_name, current_iter):
    """Where the difficulty map of a validated image goes: beside the image that SRModel saves."""
    name, folder = osp.splitext(osp.basename(lq_path))[0], opt['path']['visualization']
    if opt['is_train']:
        return osp.join(folder, name, f'{name}_{current_iter}_map.png')
    return osp.join(folder, dataset_name, f"{name}_{opt['val'].get('suffix') or opt['name']}_map.png")


@MODEL_REGISTRY.register()
class CDNSRModel(FastTraining, SRModel):
    """CDNSR: trains a soft mixture of branches, validates with hard routing over tiles.

    Paper: Classification-Based Dynamic Network for Efficient Super-Resolution (ICASSP 2023).

    What its option files may say beyond SRModel's: CDNSRFile, and docs/Options.md.
    """

    def __init__(self, opt):
        self.upscalers = {}
        super(CDNSRModel, self).__init__(opt)

    option_file = CDNSRFile
    check_options = staticmethod(check_options)

    def model_to_device(self, net):
        for i, branch in enumerate(net.branches):
            self.check_scale(branch, f'network_g.branches[{i}]')
        net.train(self.is_train)
        if self.is_train:
            # freeze before DistributedDataParallel looks which parameters it has to synchronise
            net.freeze(self.settings.train.freeze)
        return super(CDNSRModel, self).model_to_device(net)

    def init_training_settings(self):
        branch_paths = self.opt['path'].get('pretrain_network_branches')
        if self.opt['path'].get('resume_state'):
            branch_paths = None  # the resumed network has them already
        for branch, path in zip(self.get_bare_model(self.net_g).branches, branch_paths or []):
            if path is not None:
                self.load_pretrained(branch, path, 'g')
            elif any(True for _ in branch.parameters()):
                raise OptionError(
                    'path.pretrain_network_branches', f'is ~ for a {type(branch).__name__}, which has '
                    'weights; only a branch without any, such as Interpolation, needs no checkpoint')

        self._build_losses()
        if not self.opt['train'].get('pixel_opt'):  # SRModel insists on one; what is minimised is in self.losses
            self.opt['train']['pixel_opt'] = {'type': 'L1Loss'}
        super(CDNSRModel, self).init_training_settings()
        if hasattr(self, 'net_g_ema') and branch_paths:
            self.model_ema(0)

        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.train.precision == 'float16')
        self.costs = self.upscaler(self.get_bare_model(self.net_g)).costs.to(self.device)
        for net in (self.get_bare_model(self.net_g), getattr(self, 'net_g_ema', None)):
            if hasattr(getattr(net, 'classifier', None), 'costs'):
                net.classifier.costs.copy_(self.costs)
        costs = [round(cost, 3) for cost in self.costs.tolist()]
        if 'flops' in self.losses and len(set(costs)) == 1:
            raise OptionError('train.flops_opt', 'all branches cost the same, so there is nothing to trade')
        if costs != sorted(costs):
            get_root_logger().warning(f'network_g.branches are not listed from cheap to dear, their relative costs are '
                                      f'{costs}. Labels, distillation and the difficulty map take the first for the '
                                      'easiest.')
        if self.settings.train.compile:  # after the branches' operations have been counted
            if self.opt['dist']:  # its splitting of graphs fails at autograd functions in some versions
                torch._dynamo.config.optimize_ddp = False
            for branch in self.get_bare_model(self.net_g).branches:
                branch.compile()

    def _build_losses(self):
        train_opt = self.opt['train']
        self.losses = OrderedDict()
        for name in LOSSES:
            if train_opt.get(f'{name}_opt'):
                self.losses[name] = build_loss(train_opt[f'{name}_opt']).to(self.device)

        layers = {layer for loss in self.losses.values() for layer in getattr(loss, 'layers', [])}
        extractor, self.net_t = None, self.load_teacher()
        if layers:
            try:
                extractor = VGG19Features(sorted(layers), self.settings.train.feature_extractor.weights).to(self.device)
            except ValueError as error:
                raise OptionError('train.feature_extractor', str(error)) from error
        if extractor is not None:
            extractor.to(memory_format=self.memory_format())
        names = [name for name in DISTILLATION_LOSSES if name in self.losses]
        self.distillation = Distillation(names, self.opt['scale'], extractor)

        predicts_errors = hasattr(self.get_bare_model(self.net_g).classifier, 'errors')
        kind = self.opt['network_g']['classifier']['type']
        if 'error' in self.losses and not predicts_errors:
            raise OptionError(
                'train.error_opt', 'needs a classifier that predicts errors, such as ErrorPredictor, but '
                f'network_g.classifier.type is {kind}')
        if predicts_errors and 'error' not in self.losses and 'classifier' not in self.settings.train.freeze:
            raise OptionError('train.error_opt', f'is what trains {kind}; without it, freeze: [classifier]')
        for name in ('class', 'average', 'flops'):
            if name in self.losses and predicts_errors:
                raise OptionError(f'train.{name}_opt', f'cannot train {kind}, whose classes follow from errors and '
                                  'costs; use error_opt')
        self.guard = None
        # an ErrorPredictor's shares follow from errors and costs: nothing pushes them
        if 'classifier' not in self.settings.train.freeze and not predicts_errors:
            self.guard = CollapseGuard(
                len(self.opt['network_g']['branches']), self.settings.train.collapse_share,
                self.settings.train.collapse_iter,
                self.losses['average'] if self.settings.train.balance == 'auto' else None)

        if self.opt['dist']:  # averages the gradient of what a loss trains itself
            for name, loss in self.losses.items():
                if any(param.requires_grad for param in loss.parameters()):
                    self.losses[name] = super(CDNSRModel, self).model_to_device(loss)

    def trained_parameters(self):
        heads = [param for loss in self.losses.values() for param in loss.parameters() if param.requires_grad]
        return [*super(CDNSRModel, self).trained_parameters(), heads]

    def feed_data(self, data):
        super(CDNSRModel, self).feed_data(data)
        self.label = data.get('label')
        self.errors = data.get('errors')
        if 'gt' not in data:
            self.__dict__.pop('gt', None)  # that of the training batch
        elif self.gt.shape[-2:] != tuple(self.opt['scale'] * length for length in self.lq.shape[-2:]):
            raise OptionError(
                str(data.get('gt_path')), f"GT of {tuple(self.gt.shape[-2:])} is not x{self.opt['scale']} of "
                f'LQ of {tuple(self.lq.shape[-2:])}')

    def _checked_labels(self):
        labels, num_classes = self.label, len(self.costs)
        if not 0 <= labels.min() <= labels.max() < num_classes:
            raise OptionError(
                'datasets.train.label_file',
                f'holds labels such as {labels.max()}; accepted: 0 to {num_classes - 1}, one class per branch')
        return self.to_device(labels)

    def _checked_errors(self):
        if self.errors is None:
            return None
        errors, num_classes = self.to_device(self.errors), len(self.costs)
        if errors.shape[1] != num_classes:
            raise OptionError(
                'datasets.train.label_file', f'holds {errors.shape[1]} errors for each patch, but there '
                f'are {num_classes} branches; it was made for another network')
        return errors

    def optimize_parameters(self, current_iter):
        train_opt = self.settings.train
        tau = max(1 - current_iter / train_opt.total_iter, train_opt.tau_min)
        self.get_bare_model(self.net_g).tau = tau

        self.optimizer_g.zero_grad()
        lq, gt = self.patches()
        known_errors = None
        if 'error' in self.losses and train_opt.freeze == ['branches']:
            known_errors = self._checked_errors()
        need_none = NEED_NO_IMAGES if known_errors is None else (*NEED_NO_IMAGES, 'error')
        with self.autocast():
            run_branches = any(name not in need_none for name in self.losses)
            self.output, routing = self.net_g(lq, return_routing=True, run_branches=run_branches)
            # losses are computed in float32, which logits, weights and mixture are already
            if run_branches:
                routing = routing._replace(branch_outputs=tuple(output.float() for output in routing.branch_outputs))
            arguments = self.distillation.arguments(lq, routing, self.teach(lq))
        arguments.update({
            'pixel': (self.output, gt),
            'class': (routing.weights, ),
            'average': (softened(routing.logits) if train_opt.balance == 'auto' else routing.weights, ),
            'flops': (routing.weights, self.costs),
        })
        if 'error' in self.losses:
            if known_errors is None:
                known_errors = torch.stack([squared_error(output, gt) for output in routing.branch_outputs], dim=1)
            arguments['error'] = (self.get_bare_model(self.net_g).classifier.errors(routing.logits), known_errors)
        if 'branch' in self.losses:
            outputs = torch.stack(routing.branch_outputs, dim=1)
            weights = routing.weights[..., None, None, None].expand_as(outputs)
            arguments['branch'] = (outputs, gt.unsqueeze(1).expand_as(outputs), weights)
        if 'label' in self.losses:
            arguments['label'] = (routing.logits, self._checked_labels(), current_iter)
        log = OrderedDict((f'l_{name}', loss(*arguments[name])) for name, loss in self.losses.items())
        self.scaler.scale(sum(log.values())).backward()
        self.scaler.step(self.optimizer_g)
        self.scaler.update()

        with torch.no_grad():
            log['cost'] = (routing.weights @ self.costs).mean()
            log['entropy'] = routing_entropy(routing.logits)
            counts = class_counts(routing.logits)
            log.update((f'share_{i}', share) for i, share in enumerate(counts / counts.sum()))
        self.keep_log(log)
        if self.guard is not None:
            self.guard(counts)

        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def get_current_log(self):
        super(CDNSRModel, self).get_current_log()
        self.log_dict['tau'] = self.get_bare_model(self.net_g).tau
        self.log_dict['lr'] = self.get_current_learning_rate()[0]
        return self.log_dict

    def upscaler(self, net):
        """The engine for a network; it is kept, since it counts the branches' operations when it is made."""
        if id(net) not in self.upscalers:
            self.upscalers[id(net)] = RoutedUpscaler(net, self.settings.tile.patch_size, self.settings.tile.step)
        return self.upscalers[id(net)]

    def test(self):
        upscaled = self.upscaler(self.tested_net()).upscale(self.lq)
        self.output = upscaled.image
        if hasattr(self, 'routing_stats'):
            self._record(upscaled)

    def begin_validation(self, dataset_name, current_iter, tb_logger):
        super(CDNSRModel, self).begin_validation(dataset_name, current_iter, tb_logger)
        num_classes = len(self.get_bare_model(self.net_g).branches)
        self.tb_images = 0
        self.upscaler(self.tested_net()).refresh()  # fused optimizers leave the versions of weights alone
        zeros = {key: torch.zeros(num_classes, dtype=torch.float64) for key in ('tiles', 'pixels', 'squared_error')}
        self.routing_stats = dict(zeros, cost=0., lq_pixels=0)

    def _record(self, upscaled):
        """Adds one validated image to the statistics, saves its difficulty map if asked to, shows it in TensorBoard."""
        stats, num_classes = self.routing_stats, len(self.routing_stats['tiles'])
        lq_pixels = upscaled.tiling.height * upscaled.tiling.width
        stats['tiles'] += torch.bincount(upscaled.classes, minlength=num_classes)
        stats['cost'] += upscaled.cost * lq_pixels
        stats['lq_pixels'] += lq_pixels
        class_map = upscaled.tiling.class_map(upscaled.classes)
        if hasattr(self, 'gt'):
            scale = self.opt['scale']
            owner = class_map.repeat_interleave(scale, 0).repeat_interleave(scale, 1).flatten()
            error = (self.output[0].clamp(0, 1).mul(255).round() - self.gt[0].mul(255).round()).cpu().double()
            stats['pixels'] += torch.bincount(owner, minlength=num_classes)
            stats['squared_error'] += torch.bincount(owner, error.square().mean(dim=0).flatten(), num_classes)
        tb_logger = self.validated[2]
        if self.settings.val.save_map or tb_logger is not None and self.tb_images < TB_IMAGES:
            image = in_bgr(tensor2img([self.output]))
            difficulty_map = draw_difficulty_map(image, class_map.numpy(), num_classes)
            if self.settings.val.save_map:
                imwrite(difficulty_map, map_path(self.opt, self.lq_path[0], *self.validated[:2]))
            if tb_logger is not None and self.tb_images < TB_IMAGES:
                self.tb_images += 1
                self._show(image, difficulty_map)

    def _show(self, image, difficulty_map):
        """Puts the middle of an image, and its difficulty map, into TensorBoard."""
        dataset_name, current_iter, tb_logger = self.validated
        name = osp.splitext(osp.basename(self.lq_path[0]))[0]
        top, left = (max(0, (length - TB_SIDE) // 2) for length in image.shape[:2])
        shrunk = min(1, TB_SIDE / max(difficulty_map.shape[:2]))
        difficulty_map = cv2.resize(difficulty_map, None, fx=shrunk, fy=shrunk, interpolation=cv2.INTER_AREA)
        pictures = {'sr': image[top:top + TB_SIDE, left:left + TB_SIDE], 'difficulty_map': difficulty_map}
        for kind, picture in pictures.items():
            tb_logger.add_image(f'{dataset_name}/{name}/{kind}', picture[..., ::-1], current_iter, dataformats='HWC')

    def log_routing(self):
        dataset_name, current_iter, tb_logger = self.validated
        stats, costs = self.routing_stats, self.upscaler(self.tested_net()).costs
        shares = stats['tiles'] / stats['tiles'].sum().clamp(min=1)
        psnrs = 10 * torch.log10(255**2 * stats['pixels'] / stats['squared_error'])
        cost = stats['cost'] / max(stats['lq_pixels'], 1)
        message = (
            f'Routing {dataset_name}\n\t # cost: {cost:.4f} of the hardest branch on whole images, classifier and '
            f'tile overlap included ({(shares * costs).sum():.4f} for the branches per tile)\n')
        scalars = {'cost': cost}
        for i, (share, count) in enumerate(zip(shares.tolist(), stats['tiles'].tolist())):
            psnr = f'{psnrs[i]:.4f}' if stats['pixels'][i] > 0 else '-'
            message += f'\t # class {i}: {100 * share:.1f} % ({count:.0f} tiles)\tPSNR: {psnr}\tcost: {costs[i]:.4f}\n'
            scalars.update({f'share_{i}': share, f'count_{i}': count})
            if stats['pixels'][i] > 0:
                scalars[f'psnr_{i}'] = psnrs[i].item()
        get_root_logger().info(message)
        if tb_logger:
            for name, value in scalars.items():
                tb_logger.add_scalar(f'routing/{dataset_name}/{name}', value, current_iter)

    def own_state(self):
        heads = {name: self.get_bare_model(loss).state_dict() for name, loss in self.losses.items()}
        return {'losses': heads, 'scaler': self.scaler.state_dict()}

    def own_process_state(self):
        return {'guard': self.guard and self.guard.state_dict()}

    def resume_own_state(self, state, process_state):
        for name, head in state.get('losses', {}).items():
            if name in self.losses:
                self.get_bare_model(self.losses[name]).load_state_dict(head)
        if state.get('scaler'):
            self.scaler.load_state_dict(state['scaler'])
        if self.guard is not None and process_state.get('guard'):
            self.guard.load_state_dict(process_state['guard'])
