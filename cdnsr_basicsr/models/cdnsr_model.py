import torch
from collections import OrderedDict
from os import path as osp

from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from ..checkpoint import load_checkpoint, plain, save_checkpoint
from ..inference.difficulty_map import draw_difficulty_map
from ..inference.engine import RoutedUpscaler
from ..options import OptionError, check_keys, check_number

# what CDNSRModel and BasicSR's pipelines read, block by block
KEYS = {
    'option file': ('name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'tile', 'path',
                    'train', 'val', 'logger', 'dist_params', 'find_unused_parameters'),
    'tile': ('patch_size', 'step'),
    'path': ('pretrain_network_g', 'pretrain_network_branches', 'param_key_g', 'strict_load_g', 'resume_state',
             'ignore_resume_networks', 'experiments_root', 'results_root'),
    'train': ('ema_decay', 'freeze', 'optim_g', 'pixel_opt', 'class_opt', 'average_opt', 'flops_opt', 'scheduler',
              'tau_min', 'total_iter', 'warmup_iter'),
    'val': ('metrics', 'pbar', 'save_img', 'save_map', 'suffix', 'val_freq'),
}


@MODEL_REGISTRY.register()
class CDNSRModel(SRModel):
    """CDNSR: trains a soft mixture of branches, validates with hard routing over tiles.

    Paper: Classification-Based Dynamic Network for Efficient Super-Resolution (ICASSP 2023).

    Beyond SRModel's options it knows:
        train.pixel_opt, class_opt, average_opt, flops_opt: losses; those that are given are summed and logged as
            l_pixel, l_class, l_average, l_flops.
        train.freeze (list[str]): 'branches', 'classifier'. Default: [].
        train.tau_min (float): Least temperature of the Gumbel mixture, which is max(1 - iter/total_iter, tau_min).
            Default: 0.4.
        path.pretrain_network_branches (list[str]): One checkpoint per branch.
        tile.patch_size, tile.step (int): Tiles of validation, in LR pixels. Default: 64 and 60.
        val.save_map (bool): Whether to save the difficulty map beside each image. Default: False.
    """

    def __init__(self, opt):
        self.upscalers = {}
        super(CDNSRModel, self).__init__(opt)

    @staticmethod
    def check_options(opt, is_train):
        """Refuses what this model cannot use, by name.

        Args:
            opt (dict): Content of the option file.
            is_train (bool): Whether it is about to be trained.

        Raises:
            OptionError: For the first mistake found.
        """
        net_opt = opt.get('network_g', {})
        if net_opt.get('type') != 'CDNSR':
            raise OptionError('network_g.type', f"CDNSRModel needs type CDNSR, but got {net_opt.get('type')!r}")
        branches, upscale = net_opt['branches'], net_opt.get('upscale', 4)
        if not isinstance(branches, list) or not 2 <= len(branches) <= 5:
            raise OptionError('network_g.branches', f'expected a list of 2 to 5 branches, but got {branches!r}')
        for i, branch in enumerate(branches):
            if not isinstance(branch, dict):
                raise OptionError(f'network_g.branches[{i}]', f'expected a block with a type, but got {branch!r}')
            if branch.get('upscale', upscale) != upscale:
                raise OptionError(f'network_g.branches[{i}].upscale', f'must be {upscale} like network_g.upscale')
        if net_opt.get('mixture', 'gumbel') not in ('gumbel', 'softmax'):
            raise OptionError('network_g.mixture', f"accepted: gumbel, softmax; got {net_opt['mixture']!r}")
        if opt.get('scale') != upscale:
            raise OptionError('scale', f"is {opt.get('scale')!r}, but network_g.upscale is {upscale!r}")

        check_keys(opt, KEYS['option file'], 'option file')
        for name in ('tile', 'path', 'train', 'val'):
            if opt.get(name):
                check_keys(opt[name], KEYS[name], name)
        tile = opt.get('tile') or {}
        patch_size = tile.get('patch_size', 64)
        check_number(patch_size, 'tile.patch_size', 1, integer=True)
        check_number(tile.get('step', min(60, patch_size)), 'tile.step', 1, patch_size, integer=True)

        paths = opt['path'].get('pretrain_network_branches')
        if paths is not None and (not isinstance(paths, list) or len(paths) != len(branches)):
            raise OptionError('path.pretrain_network_branches', f'expected a list of {len(branches)} checkpoints, one '
                              f'per branch, but got {paths!r}')
        if paths and not is_train:
            raise OptionError('path.pretrain_network_branches', 'is for training; name the trained CDNSR by '
                              'pretrain_network_g')
        if is_train:
            train_opt = opt['train']
            check_keys(train_opt, train_opt, 'train', ('pixel_opt', ))
            check_number(train_opt.get('tau_min', 0.4), 'train.tau_min', 0.01, 1)
            freeze = train_opt.get('freeze') or []
            if freeze not in ([], ['branches'], ['classifier']):
                raise OptionError('train.freeze', f'accepted: [branches], [classifier] or []; got {freeze!r}')
            starts = [opt['path'].get(key) for key in ('pretrain_network_g', 'resume_state')]
            if freeze and not any(starts + ([paths] if freeze == ['branches'] else [])):
                raise OptionError('train.freeze', f'{freeze[0]} without weights would stay random; name them at path')
            if not train_opt['pixel_opt']:
                raise OptionError('train.pixel_opt', 'a pixel loss is needed')

    def _check_branches(self, net):
        channels = self.opt['network_g']['classifier'].get('num_in_ch', 3)
        for i, branch in enumerate(net.branches):
            with torch.no_grad():
                size = tuple(branch(torch.zeros(1, channels, 8, 8)).shape[-2:])
            if size != (8 * net.upscale, 8 * net.upscale):
                raise OptionError(f'network_g.branches[{i}]',
                                  f'makes {size} out of (8, 8); expected a network of scale '
                                  f'{net.upscale}')

    def model_to_device(self, net):
        self._check_branches(net)
        # freeze before DistributedDataParallel looks which parameters it has to synchronise
        if self.is_train:
            net.freeze(self.opt['train'].get('freeze') or [])
        return super(CDNSRModel, self).model_to_device(net)

    def init_training_settings(self):
        branch_paths = self.opt['path'].get('pretrain_network_branches')
        if self.opt['path'].get('resume_state'):
            branch_paths = None  # the resumed network has them already
        for branch, path in zip(self.get_bare_model(self.net_g).branches, branch_paths or []):
            load_checkpoint(path)  # says in one line what is wrong with a file
            self.load_network(branch, path, self.opt['path'].get('strict_load_g', True), 'params_ema')

        super(CDNSRModel, self).init_training_settings()
        if branch_paths and hasattr(self, 'net_g_ema'):
            self.model_ema(0)

        self.losses = OrderedDict(pixel=self.cri_pix)
        for name in ('class', 'average', 'flops'):
            loss_opt = self.opt['train'].get(f'{name}_opt')
            if loss_opt:
                self.losses[name] = build_loss(loss_opt).to(self.device)
        self.costs = self.upscaler(self.get_bare_model(self.net_g)).costs.to(self.device)
        costs = [round(cost, 3) for cost in self.costs.tolist()]
        if costs != sorted(costs):
            get_root_logger().warning(f'network_g.branches are not listed from cheap to dear, their relative costs are '
                                      f'{costs}. Labels and the difficulty map take the first for the easiest.')

    def setup_optimizers(self):
        # SRModel's would warn once for every frozen parameter
        optim_opt = dict(self.opt['train']['optim_g'])
        params = [param for param in self.net_g.parameters() if param.requires_grad]
        self.optimizer_g = self.get_optimizer(optim_opt.pop('type'), params, **optim_opt)
        self.optimizers.append(self.optimizer_g)

    def feed_data(self, data):
        super(CDNSRModel, self).feed_data(data)
        self.lq_path = data.get('lq_path')
        if 'gt' not in data:
            self.__dict__.pop('gt', None)  # that of the training batch
        elif self.gt.shape[-2:] != tuple(self.opt['scale'] * length for length in self.lq.shape[-2:]):
            raise OptionError(
                str(data.get('gt_path')), f"GT of {tuple(self.gt.shape[-2:])} is not x{self.opt['scale']} of "
                f'LQ of {tuple(self.lq.shape[-2:])}')

    def optimize_parameters(self, current_iter):
        train_opt = self.opt['train']
        tau = max(1 - current_iter / train_opt['total_iter'], train_opt.get('tau_min', 0.4))
        self.get_bare_model(self.net_g).tau = tau

        self.optimizer_g.zero_grad()
        self.output, routing = self.net_g(self.lq, return_routing=True)
        arguments = {
            'pixel': (self.output, self.gt),
            'class': (routing.weights, ),
            'average': (routing.weights, ),
            'flops': (routing.weights, self.costs),
        }
        log = OrderedDict((f'l_{name}', loss(*arguments[name])) for name, loss in self.losses.items())
        sum(log.values()).backward()
        self.optimizer_g.step()

        with torch.no_grad():
            log['cost'] = (routing.weights @ self.costs).mean()
            for i, share in enumerate(routing.weights.mean(dim=0)):
                log[f'share_{i}'] = share
        self.log_dict = self.reduce_loss_dict(log)
        self.log_dict['tau'] = tau

        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def upscaler(self, net):
        """The engine for a network; it is kept, since it measures the branches when it is made."""
        if id(net) not in self.upscalers:
            tile = self.opt.get('tile') or {}
            patch_size = tile.get('patch_size', 64)
            self.upscalers[id(net)] = RoutedUpscaler(net, patch_size, tile.get('step', min(60, patch_size)))
        return self.upscalers[id(net)]

    def _tested_net(self):
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def test(self):
        net = self._tested_net()
        training = net.training
        net.eval()
        upscaled = self.upscaler(net).upscale(self.lq)
        net.train(training)
        self.output = upscaled.image
        if hasattr(self, 'routing_stats'):
            self._record(upscaled)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        num_classes = len(self.get_bare_model(self.net_g).branches)
        self.validated = (dataloader.dataset.opt['name'], current_iter)
        zeros = {key: torch.zeros(num_classes, dtype=torch.float64) for key in ('tiles', 'pixels', 'squared_error')}
        self.routing_stats = dict(zeros, cost=0., lq_pixels=0)
        super(CDNSRModel, self).nondist_validation(dataloader, current_iter, tb_logger, save_img)
        self._log_routing(tb_logger)
        del self.routing_stats

    def _record(self, upscaled):
        """Adds one validated image to the statistics, and saves its difficulty map if asked to."""
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
        if self.opt['val'].get('save_map'):
            self._save_map(class_map, num_classes)

    def _save_map(self, class_map, num_classes):
        dataset_name, current_iter = self.validated
        name = osp.splitext(osp.basename(self.lq_path[0]))[0]
        if self.opt['is_train']:  # where SRModel puts the image
            path = osp.join(self.opt['path']['visualization'], name, f'{name}_{current_iter}_map.png')
        else:
            suffix = self.opt['val'].get('suffix') or self.opt['name']
            path = osp.join(self.opt['path']['visualization'], dataset_name, f'{name}_{suffix}_map.png')
        imwrite(draw_difficulty_map(tensor2img([self.output]), class_map.numpy(), num_classes), path)

    def _log_routing(self, tb_logger):
        dataset_name, current_iter = self.validated
        stats, costs = self.routing_stats, self.upscaler(self._tested_net()).costs
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

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        """Saves BasicSR's checkpoint with network_g and scale added, complete or not at all.

        Args:
            net (nn.Module | list[nn.Module]): Network(s) to be saved.
            net_label (str): Network label.
            current_iter (int): Current iteration, -1 for the last.
            param_key (str | list[str]): Key(s) to save the network(s) under. Default: 'params'.
        """
        nets, keys = (net, param_key) if isinstance(net, list) else ([net], [param_key])
        content = {key: self.get_bare_model(net_).state_dict() for key, net_ in zip(keys, nets)}
        content = {key: {name: param.cpu() for name, param in state.items()} for key, state in content.items()}
        content.update(network_g=plain(self.opt['network_g']), scale=self.opt['scale'])
        name = f"{net_label}_{'latest' if current_iter == -1 else current_iter}.pth"
        save_checkpoint(content, osp.join(self.opt['path']['models'], name))

    @master_only
    def save_training_state(self, epoch, current_iter):
        """Saves what resuming needs, complete or not at all.

        Args:
            epoch (int): Current epoch.
            current_iter (int): Current iteration; at -1, the end of training, there is nothing to resume.
        """
        if current_iter == -1:
            return
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
        }
        save_checkpoint(state, osp.join(self.opt['path']['training_states'], f'{current_iter}.state'))
