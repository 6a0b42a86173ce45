import torch
from collections import OrderedDict

from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from ..inference.network import maps_errors, predicts_errors
from ..losses import VGG19Features, squared_error
from ..options import OptionError
from .cdnsr_options import DISTILLATION_LOSSES, LOSSES, CDNSRFile, check_options
from .collapse_guard import CollapseGuard, class_counts, routing_entropy, softened
from .distillation import Distillation
from .fast_training import FastTraining
from .routed_validation import RoutedValidation

NEED_NO_IMAGES = ('class', 'average', 'flops', 'label')  # losses of what the classifier says alone


@MODEL_REGISTRY.register()
class CDNSRModel(RoutedValidation, FastTraining, SRModel):
    """CDNSR: trains a soft mixture of branches, validates with hard routing over tiles.

    Paper: Classification-Based Dynamic Network for Efficient Super-Resolution (ICASSP 2023).

    What its option files may say beyond SRModel's: CDNSRFile, and docs/Options.md.
    """
    unit, parts, hardest = 'tile', 'branches', 'hardest branch'

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

        self.costs = self.upscaler(self.get_bare_model(self.net_g)).costs.to(self.device)
        for net in (self.get_bare_model(self.net_g), getattr(self, 'net_g_ema', None)):
            predictor = None if net is None else predicts_errors(net.classifier)
            if predictor is not None:
                predictor.costs.copy_(self.costs)
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
        losses = OrderedDict((name, self.build_loss(name)) for name in LOSSES)
        self.losses = OrderedDict((name, loss) for name, loss in losses.items() if loss is not None)

        layers = {layer for loss in self.losses.values() for layer in getattr(loss, 'layers', [])}
        extractor, self.net_t = None, self.load_teacher()
        if layers:
            try:
                extractor = VGG19Features(sorted(layers), self.settings.train.feature_extractor.weights)
            except ValueError as error:
                raise OptionError('train.feature_extractor', str(error)) from error
            extractor.to(self.device, memory_format=self.memory_format())
        names = [name for name in DISTILLATION_LOSSES if name in self.losses]
        self.distillation = Distillation(names, self.opt['scale'], extractor)

        from_errors = predicts_errors(self.get_bare_model(self.net_g).classifier) is not None
        kind = self.opt['network_g']['classifier']['type']
        if 'error' in self.losses and not from_errors:
            raise OptionError(
                'train.error_opt', 'needs a classifier that predicts errors, such as ErrorPredictor, but '
                f'network_g.classifier.type is {kind}')
        if from_errors and 'error' not in self.losses and 'classifier' not in self.settings.train.freeze:
            raise OptionError('train.error_opt', f'is what trains {kind}; without it, freeze: [classifier]')
        for name in ('class', 'average', 'flops'):
            if name in self.losses and from_errors:
                raise OptionError(f'train.{name}_opt', f'cannot train {kind}, whose classes follow from errors and '
                                  'costs; use error_opt')
        self.guard = None
        # an ErrorPredictor's shares follow from errors and costs: nothing pushes them
        if 'classifier' not in self.settings.train.freeze and not from_errors:
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

    def _checked_errors(self):
        if self.errors is None:
            return None
        errors, num_classes = self.to_device(self.errors), len(self.costs)
        if errors.shape[1] != num_classes:
            raise OptionError(
                'datasets.train.label_file', f'holds {errors.shape[1]} errors for each patch, but there '
                f'are {num_classes} branches; it was made for another network')
        return errors

    def compute_losses(self, current_iter):
        train_opt, net = self.settings.train, self.get_bare_model(self.net_g)
        net.tau = max(1 - current_iter / train_opt.total_iter, train_opt.tau_min)

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
            arguments['error'] = self._errors(net.classifier, routing, lq, gt, known_errors)
        if 'branch' in self.losses:
            outputs = torch.stack(routing.branch_outputs, dim=1)
            weights = routing.weights[..., None, None, None].expand_as(outputs)
            arguments['branch'] = (outputs, gt.unsqueeze(1).expand_as(outputs), weights)
        if 'label' in self.losses:
            arguments['label'] = (routing.logits, self.to_device(self.label), current_iter)
        log = OrderedDict((f'l_{name}', loss(*arguments[name])) for name, loss in self.losses.items())
        with torch.no_grad():
            log['cost'] = (routing.weights @ self.costs).mean()
            log['entropy'] = routing_entropy(routing.logits)
            counts = class_counts(routing.logits)
            log.update((f'share_{i}', share) for i, share in enumerate(counts / counts.sum()))
        if self.guard is not None:
            self.guard(counts)
        return log

    def _errors(self, classifier, routing, lq, gt, known):
        """Predicted errors and those that were made: of patches where these were known before, else of cells, if the
        classifier tells them apart.
        """
        mapper = maps_errors(classifier)
        if known is not None or mapper is None:
            if known is None:
                known = torch.stack([squared_error(output, gt) for output in routing.branch_outputs], dim=1)
            return classifier.errors(routing.logits), known
        cell = mapper.cell * self.opt['scale']
        known = torch.stack([squared_error(output, gt, cell) for output in routing.branch_outputs], dim=1)
        return mapper.error_map(lq)[..., :known.shape[2], :known.shape[3]], known

    def upscaler(self, net):
        # operations also where branches are of different archs: what a training does depends on no machine
        return super(CDNSRModel, self).upscaler(net, cost='macs')

    def get_current_log(self):
        super(CDNSRModel, self).get_current_log()
        self.log_dict['tau'] = self.get_bare_model(self.net_g).tau
        self.log_dict['lr'] = self.get_current_learning_rate()[0]
        return self.log_dict

    def class_names(self):
        return {f'{i}': f'class {i}' for i in range(len(self.get_bare_model(self.net_g).branches))}

    def class_costs(self):
        return self.upscaler(self.tested_net()).costs

    def own_state(self):
        return {'losses': {name: self.get_bare_model(loss).state_dict() for name, loss in self.losses.items()}}

    def own_process_state(self):
        return {'guard': self.guard and self.guard.state_dict()}

    def resume_own_state(self, state, process_state):
        for name, head in state.get('losses', {}).items():
            if name in self.losses:
                self.get_bare_model(self.losses[name]).load_state_dict(head)
        if self.guard is not None and process_state.get('guard'):
            self.guard.load_state_dict(process_state['guard'])
