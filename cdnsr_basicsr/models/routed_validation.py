import cv2
import torch
from os import path as osp
from torch.nn import functional as F

from basicsr.utils import get_root_logger, imwrite, tensor2img
from ..files import replace_when_done
from ..inference import make_upscaler
from ..inference.difficulty_map import draw_difficulty_map, in_bgr
from ..options import OptionError

TB_IMAGES = 4  # of each validation set
TB_SIDE = 512  # largest side of an image in TensorBoard, in pixels


class RoutedValidation:
    """Part of a model whose network routes: it is validated with the engine of `basicsr upscale`, and the share and
    cost of each class go to the log, to TensorBoard, and into difficulty maps (val.save_map).

    A model gives `class_names` and `class_costs`, and the words of the report: `unit`, what gets a class;
    `parts`, what is run on it; and `hardest`, what costs are relative to.
    """

    def __init__(self, opt):
        self.upscalers = {}
        super(RoutedValidation, self).__init__(opt)

    def class_names(self):
        """What the log calls each class, by its name among the scalars."""
        raise NotImplementedError

    def class_costs(self):
        """Cost of each class for one unit, relative to the hardest, of shape (M, )."""
        raise NotImplementedError

    def upscaler(self, net, **kwargs):
        """The engine for a network; it is kept, since it counts the network's operations when it is made."""
        if id(net) not in self.upscalers:
            tile = self.settings.tile
            self.upscalers[id(net)] = make_upscaler(net, tile.patch_size, tile.step, **kwargs)
        return self.upscalers[id(net)]

    def feed_data(self, data):
        super(RoutedValidation, self).feed_data(data)
        if 'gt' not in data:
            self.__dict__.pop('gt', None)  # that of the training batch
        elif self.gt.shape[-2:] != tuple(round(self.opt['scale'] * length) for length in self.lq.shape[-2:]):
            raise OptionError(
                str(data.get('gt_path')), f"GT of {tuple(self.gt.shape[-2:])} is not x{self.opt['scale']} of "
                f'LQ of {tuple(self.lq.shape[-2:])}')

    def test(self):
        upscaled = self.upscaler(self.tested_net()).upscale(self.lq)
        self.output = upscaled.image
        if hasattr(self, 'routing_stats'):
            self._record(upscaled)

    def begin_validation(self, dataset_name, current_iter, tb_logger):
        super(RoutedValidation, self).begin_validation(dataset_name, current_iter, tb_logger)
        self.upscaler(self.tested_net()).refresh()  # fused optimizers leave the versions of weights alone
        self.tb_images = 0
        num_classes = len(self.class_names())
        zeros = {key: torch.zeros(num_classes, dtype=torch.float64) for key in ('counts', 'pixels', 'squared_error')}
        self.routing_stats = dict(zeros, cost=0., lq_pixels=0)

    def _record(self, upscaled):
        """Adds one validated image to the statistics, saves its difficulty map if asked to, shows it in TensorBoard."""
        stats, counts, class_map = self.routing_stats, upscaled.counts, upscaled.plan.class_map()
        stats['counts'] += torch.tensor(counts)
        stats['cost'] += upscaled.cost * class_map.numel()
        stats['lq_pixels'] += class_map.numel()
        if hasattr(self, 'gt'):
            owner = class_map.to(torch.uint8)[None, None]
            owner = F.interpolate(owner, tuple(self.output.shape[-2:]), mode='nearest-exact').flatten()
            error = (self.output[0].clamp(0, 1).mul(255).round() - self.gt[0].mul(255).round()).cpu().double()
            stats['pixels'] += torch.bincount(owner, minlength=len(counts))
            stats['squared_error'] += torch.bincount(owner, error.square().mean(dim=0).flatten(), len(counts))
        saved, shown = self.settings.val.save_map, self.validated[2] and self.tb_images < TB_IMAGES
        if saved or shown:
            image = in_bgr(tensor2img([self.output]))
            difficulty_map = draw_difficulty_map(image, class_map.numpy(), len(counts))
            if saved:
                with replace_when_done(self._map_path()) as temporary:
                    imwrite(difficulty_map, str(temporary))
            if shown:
                self.tb_images += 1
                self._show(image, difficulty_map)

    def _map_path(self):
        """Where the difficulty map of a validated image goes: beside the image that SRModel saves."""
        name, folder = osp.splitext(osp.basename(self.lq_path[0]))[0], self.opt['path']['visualization']
        dataset_name, current_iter, _ = self.validated
        if self.opt['is_train']:
            return osp.join(folder, name, f'{name}_{current_iter}_map.png')
        return osp.join(folder, dataset_name, f"{name}_{self.opt['val'].get('suffix') or self.opt['name']}_map.png")

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
        (dataset_name, current_iter, tb_logger), stats, costs = self.validated, self.routing_stats, self.class_costs()
        counts, pixels = stats['counts'], stats['pixels']
        shares = counts / counts.sum().clamp(min=1)
        psnrs = 10 * torch.log10(255**2 * pixels / stats['squared_error'])
        scalars = {'cost': float(stats['cost'] / max(stats['lq_pixels'], 1))}
        message = (f'Routing {dataset_name}\n\t # cost: {scalars["cost"]:.4f} of the {self.hardest} on whole images, '
                   'classifier and tile overlap included '
                   f'({(shares * costs).sum():.4f} for the {self.parts} per {self.unit})\n')
        for i, (name, label) in enumerate(self.class_names().items()):
            psnr = f'{psnrs[i]:.4f}' if pixels[i] > 0 else '-'
            message += (f'\t # {label}: {100 * shares[i]:.1f} % ({counts[i]:.0f} {self.unit}s)\tPSNR: {psnr}\t'
                        f'cost: {costs[i]:.4f}\n')
            scalars.update({f'share_{name}': shares[i].item(), f'count_{name}': counts[i].item()})
            if pixels[i] > 0:
                scalars[f'psnr_{name}'] = psnrs[i].item()
        get_root_logger().info(message)
        if tb_logger:
            for name, value in scalars.items():
                tb_logger.add_scalar(f'routing/{dataset_name}/{name}', value, current_iter)
