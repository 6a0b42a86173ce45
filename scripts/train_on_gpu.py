"""Trains networks side by side on one GPU, from photographs in its memory, each step replayed as a CUDA graph.

Small networks leave a GPU idle: starting hundreds of short kernels from Python takes the time, and reading patches
does. Here neither is left. What is trained is the option file's model (FastSRModel or ETDSModel), and its step is the
one of `basicsr train`, with the losses, optimizer, schedule, precision and EMA of the option file.

Usage:
    python scripts/train_on_gpu.py --photographs FOLDER ... --val held Set14 --seconds 480 -o trained \\
        'SPANV2 options/train_modern_branch1.yml datasets:train:batch_size_per_gpu=32 datasets:train:gt_size=192' \\
        'SMFANet options/train_modern_branch3.yml train:teacher_opt={"type":"L1Loss","loss_weight":1.0}' \\
        --teacher smfanet_plus.pth

Each run is a name, an option file and changes to it, as --force_yml takes them. Patches are cut at random places out of
whole photographs, at their own size and at the fractions of --sizes, flipped and rotated as the option file says; the
data that it names are not read. `--degraded COUNT` makes that many pairs instead, of the photographs that the first
option file names (options/train_photo_branch1.yml), as scripts/degrade.py does. `--val` takes folders of HR images,
or of pairs in gt/ and lq/. PSNR is RGB, with a border of as many pixels as the scale left out, of the EMA weights.
Without a GPU the same is done step by step.
"""
import argparse
import csv
import math
import re
import time
import torch
from collections import deque
from compare_training import parse
from copy import deepcopy
from degrade import make_pairs
from pathlib import Path

import cdnsr_basicsr
from basicsr.models import build_model
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.data.prepare import read_bgr
from cdnsr_basicsr.inference import make_upscaler
from cdnsr_basicsr.inference.image_io import list_images
from cdnsr_basicsr.options import resolve_options

EAGER = 12  # iterations before each capture: libraries choose their kernels, and what begins differently has begun
MEASURED = 5  # seconds to find out how long all iterations take
WAITING = 4  # steps of a run that may wait on the GPU
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def resize_matrix(size, factor):
    """MATLAB's imresize along one side, as a matrix.

    Args:
        size (int): Pixels of the side.
        factor (float): Size of the result as a fraction of it, at most 1.

    Returns:
        Tensor: of shape (ceil(size * factor), size), float64.
    """
    made = torch.arange(1, -int(-size * factor // 1) + 1, dtype=torch.float64)
    centre, reach = made / factor + 0.5 * (1 - 1 / factor), 4 / factor
    taps = (centre - reach / 2).floor()[:, None] + torch.arange(int(-(-reach // 1)) + 2)
    distance = ((centre[:, None] - taps) * factor).abs()
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance <= 2, far, 0))
    mirrored = (taps.long() - 1) % (2 * size)
    mirrored = torch.minimum(mirrored, 2 * size - 1 - mirrored)
    matrix = torch.zeros(len(made), size, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored, weights / weights.sum(1, keepdim=True))


def shrink(image, factor):
    """MATLAB's bicubic imresize.

    Args:
        image (Tensor): of shape (h, w, c), uint8.
        factor (float): At most 1.

    Returns:
        Tensor: of shape (ceil(h * factor), ceil(w * factor), c), uint8.
    """
    rows, columns = (resize_matrix(size, factor).float().to(image.device) for size in image.shape[:2])
    made = torch.einsum('yh,hwc->ywc', rows, image.float())
    return torch.einsum('xw,ywc->yxc', columns, made).round().clamp(0, 255).byte()


def read_images(folder):
    """The images of a folder, on the device, as (h, w, 3), uint8."""
    for path in list_images(Path(folder)).images:
        yield torch.from_numpy(read_bgr(path)[0][..., ::-1].copy()).to(DEVICE)


def pairs(folders, scale, fractions=(1, )):
    """HR and LR images of folders, on the device, as (h, w, 3), uint8."""
    for whole in (whole for folder in folders for whole in read_images(folder)):
        for fraction in fractions:
            gt = whole if fraction == 1 else shrink(whole, fraction)
            gt = gt[:gt.shape[0] // scale * scale, :gt.shape[1] // scale * scale]
            yield gt, shrink(gt, 1 / scale)


def validation_pairs(folder, scale):
    """GT and LR of a folder of HR images, or of one with gt/ and lq/, as `pairs`."""
    if Path(folder, 'lq').is_dir():
        return list(zip(*(list(read_images(Path(folder, name))) for name in ('gt', 'lq'))))
    return list(pairs([folder], scale))


def image(pixels):
    """An image of shape (h, w, 3), uint8, as a batch of shape (1, 3, h, w) in [0, 1]."""
    return pixels.permute(2, 0, 1)[None] / 255


def degraded(opt, count):
    """Pairs of patches as make_pairs of degrade.py makes them, on the device."""
    made = make_pairs(opt, count, opt['datasets']['train']['num_worker_per_gpu'])
    return zip(*(torch.from_numpy(images).to(DEVICE) for images in made))


class Photographs:
    """Whole photographs in the memory of the device, and random patches of them.

    Args:
        pictures (Iterable[tuple[Tensor, Tensor]]): HR and LR, of shape (h, w, 3), uint8, on the device.
        scale (int): Of super-resolution.
        teacher (nn.Module | None): Its results are kept beside them.
    """

    def __init__(self, pictures, scale, teacher=None):
        self.scale, parts, sizes = scale, [], []
        upscaler = make_upscaler(teacher.to(DEVICE)) if teacher else None
        for gt, lq in pictures:
            taught = []
            if upscaler:
                made = upscaler.upscale(image(lq)).image[0]
                taught = [(255 * made).round().clamp(0, 255).byte().permute(1, 2, 0).reshape(-1, 3)]
            parts.append([lq.reshape(-1, 3), gt.reshape(-1, 3), *taught])
            sizes.append(lq.shape[:2])
        if not parts:
            raise SystemExit('there are no photographs to learn from')
        self.images = [torch.cat(pixels) for pixels in zip(*parts)]
        self.height, self.width = torch.tensor(sizes, device=DEVICE).T
        area = self.height * self.width
        self.start = area.cumsum(0) - area

    def check(self, side):
        """Ends the program if no patch of a side, in LR pixels, fits into any image."""
        if not torch.any((self.height >= side) & (self.width >= side)):
            need = side * self.scale
            raise SystemExit(f'{len(self.start)} images, but none has {need}x{need} pixels, as a patch of them needs')

    def patches(self, count, side, flip, rotate, taught, generator):
        """Random patches; every place of every photograph is equally likely.

        Args:
            count (int): Number of patches.
            side (int): Of the LR patches.
            flip (bool): Whether half of them are mirrored.
            rotate (bool): Whether they are turned.
            taught (bool): Whether the teacher's are asked for, too.
            generator (torch.Generator): Of random numbers on the device.

        Returns:
            list[Tensor]: LR, GT, and what the teacher makes of it, if there is one, of shape (count, 3, side, side) and
                (count, 3, side * scale, side * scale), in [0, 1].
        """
        draw = torch.rand(6, count, generator=generator, device=DEVICE, dtype=torch.float64)
        places = ((self.height - side + 1) * (self.width - side + 1)).clamp(min=0).cumsum(0)
        which = torch.searchsorted(places, (draw[0] * places[-1]).long(), right=True)
        top = (draw[1] * (self.height[which] - side + 1)).long()
        left = (draw[2] * (self.width[which] - side + 1)).long()
        mirror, upset, swap = (draw[3 + i, :, None] < 0.5 * on for i, on in enumerate((flip, rotate, rotate)))

        cut = []
        for pixels in self.images[:2 + taught]:
            scale = self.scale if cut else 1
            reach = torch.arange(side * scale, device=DEVICE).expand(count, -1)
            rows = top[:, None] * scale + torch.where(upset, side * scale - 1 - reach, reach)
            columns = left[:, None] * scale + torch.where(mirror, side * scale - 1 - reach, reach)
            rows, columns = rows * self.width[which, None] * scale, columns + self.start[which, None] * scale**2
            index = torch.where(swap[..., None], rows[:, None, :] + columns[:, :, None],
                                rows[:, :, None] + columns[:, None, :])
            cut.append(pixels[index].permute(0, 3, 1, 2) / 255)
        return cut


def rates(train, total):
    """Learning rates of all iterations, as BasicSR sets them.

    Args:
        train (dict): The option file's block.
        total (int): Number of iterations.

    Returns:
        Tensor: of shape (total, ).
    """
    schedule, at = train['scheduler'], torch.arange(total, dtype=torch.float64)
    if schedule['type'] != 'CosineAnnealingRestartLR' or len(schedule['periods']) > 1:
        raise SystemExit(f'train.scheduler: expected a CosineAnnealingRestartLR of one period, but got {schedule}')
    highest, lowest, warm = train['optim_g']['lr'], schedule['eta_min'], train.get('warmup_iter', -1)
    annealed = lowest + 0.5 * schedule['restart_weights'][0] * (highest - lowest) * (1 + (torch.pi * at / total).cos())
    return torch.where(at + 1 < warm, highest * (at + 1) / warm, annealed).float()


class Run:
    """The training of one network.

    Args:
        run (str): Name, option file and changes to it.
        photographs (Photographs): What it learns from.
        factor (float): Its iterations, as a fraction of those in the option file.
        out (str | Path): Folder for its checkpoints.
        finish (float): The last part of the iterations, in float32.
    """

    def __init__(self, run, photographs, factor, out, finish):
        self.name, path, changes = parse(run)
        opt, _ = resolve_options(path, changes)
        train = opt['train']
        self.total = train['total_iter'] = max(1, round(train['total_iter'] * factor))
        train['scheduler']['periods'] = [self.total]
        folder = Path(out, re.sub(r'\W+', '_', self.name))
        folder.mkdir(parents=True, exist_ok=True)
        opt['path'].update(models=str(folder), training_states=str(folder), experiments_root=str(folder))
        opt.update(is_train=True, dist=False, rank=0, world_size=1, num_gpu=int(DEVICE.type == 'cuda'))
        photographs.check(opt['datasets']['train']['gt_size'] // opt['scale'])
        torch.manual_seed(opt['manual_seed'])
        self.opt, self.photographs, self.model, self.done, self.graph = opt, photographs, build_model(opt), 0, None
        self.eager = EAGER
        self.generator = torch.Generator(DEVICE).manual_seed(opt['manual_seed'])
        self.last = round(self.total * (1 - finish)) if train.get('precision') != 'float32' else self.total

        self.rates, self.at = rates(train, self.total).to(DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.rate, self.waiting = torch.zeros((), device=DEVICE), deque()
        if DEVICE.type == 'cuda':
            self.stream = torch.cuda.Stream()
            for group in self.model.optimizer_g.param_groups:
                group.update(capturable=True, lr=self.rate)

    def step(self):
        """An iteration, all of it on the device."""
        data, model = self.opt['datasets']['train'], self.model
        self.rate.copy_(self.rates.index_select(0, self.at)[0])
        self.at += 1
        if DEVICE.type == 'cpu':
            for group in model.optimizer_g.param_groups:
                group['lr'] = self.rate.item()
        model.lq, model.gt, *taught = self.photographs.patches(data['batch_size_per_gpu'],
                                                               data['gt_size'] // self.opt['scale'], data['use_hflip'],
                                                               data['use_rot'], 'teacher_opt' in self.opt['train'],
                                                               self.generator)
        model.taught = taught[0] if taught else None
        model.optimize_parameters(self.done + 1)

    def capture(self):
        """Records an iteration, without doing it."""
        torch.cuda.synchronize()
        self.model.optimizer_g.zero_grad()
        self.model.loss_sums = None
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()

    def advance(self):
        """Starts the next iteration; waits for an earlier one only if many have not been done yet."""
        if self.done == self.last:
            self.model.settings.train.precision, self.graph, self.eager = 'float32', None, self.done + EAGER
        if DEVICE.type == 'cpu':
            self.step()
        elif self.done < self.eager:
            with torch.cuda.stream(self.stream):
                self.step()
        else:
            if self.graph is None:
                self.capture()
            if len(self.waiting) == WAITING:
                self.waiting.popleft().synchronize()
            with torch.cuda.stream(self.stream):
                self.graph.replay()
            self.waiting.append(self.stream.record_event())
        self.done += 1

    def loss(self):
        """Losses of the last iteration, as text."""
        return ' '.join(f'{name} {value.item():.5f}' for name, value in self.model.step_log.items())

    @torch.no_grad()
    def psnr(self, pictures):
        """Mean PSNR of the network as it would be saved, in decibels."""
        net, border, values = deepcopy(self.model.tested_net()).eval(), self.opt['scale'], []
        if hasattr(net, 'switch_to_deploy'):
            net.switch_to_deploy()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            for gt, lq in pictures:
                made = (255 * net(image(lq))[0]).round().clamp(0, 255).permute(1, 2, 0)
                error = (made - gt.float())[border:-border, border:-border].double().square().mean()
                values.append(10 * torch.log10(255**2 / error))
        return torch.stack(values).mean().item()

    def save(self):
        """Saves the newest weights and their average."""
        names = ['params', 'params_ema'] if hasattr(self.model, 'net_g_ema') else ['params']
        self.model.save_network([self.model.net_g, self.model.tested_net()][:len(names)], 'net_g', -1, names)


def go(runs, until, seconds=math.inf):
    """Advances the runs by turns, the one that is furthest back first, to the part `until` of each, or for seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and (left := [run for run in runs if run.done < math.ceil(run.total * until)]):
        min(left, key=lambda run: run.done / run.total).advance()
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(runs):
    """What all iterations of the runs would take, in seconds."""
    for run in runs:
        while run.done < min(run.total, EAGER + 10):
            run.advance()
    go(runs, max(run.done / run.total for run in runs))  # from here on all are equally far
    start, before = time.perf_counter(), sum(run.done / run.total for run in runs)
    go(runs, 1, MEASURED)
    done = (sum(run.done / run.total for run in runs) - before) / len(runs)
    return (time.perf_counter() - start) / done if done else 0.


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', metavar='RUN', help='name, option file and changes to it')
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument('--photographs', nargs='+', metavar='FOLDER', help='what to learn from, HR')
    data.add_argument(
        '--degraded', type=int, metavar='COUNT', help='or that many patches, as the first option file says')
    parser.add_argument('--sizes', nargs='+', type=float, default=[1, 0.8, 0.6], help='fractions (default: 1 0.8 0.6)')
    parser.add_argument(
        '--val', nargs='+', default=[], metavar='FOLDER', help='folders of HR images, or of gt/ and lq/')
    parser.add_argument('--teacher', metavar='CHECKPOINT', help="what makes teacher_opt's images")
    parser.add_argument('--seconds', type=float, help='fewer iterations of all runs, if they would take longer')
    parser.add_argument('--points', type=int, default=4, help='validations of a run (default: 4)')
    parser.add_argument('--finish', type=float, default=0.1, help='part in float32 at the end of others (default: 0.1)')
    parser.add_argument('-o', dest='out', required=True, help='folder for checkpoints and psnr.csv')
    args = parser.parse_args()

    start = time.perf_counter()

    def say(text):
        print(f'{time.perf_counter() - start:6.1f} s  {text}', flush=True)

    cdnsr_basicsr.register()
    torch.backends.cudnn.benchmark = True
    opt = resolve_options(*parse(args.runs[0])[1:])[0]
    scale = opt['scale']
    teacher = load_network(args.teacher).eval() if args.teacher else None
    pictures = degraded(opt, args.degraded) if args.degraded else pairs(args.photographs, scale, args.sizes)
    photographs = Photographs(pictures, scale, teacher)
    sets = {Path(folder).name: validation_pairs(folder, scale) for folder in args.val}
    say(f'{len(photographs.start)} images, {len(photographs.images[0]) / 1e6:.1f} megapixels of LR')

    needed = seconds_of([Run(run, photographs, 1, args.out, 0) for run in args.runs]) if args.seconds else 0
    factor = min(1, args.seconds / needed) if needed else 1
    runs = [Run(run, photographs, factor, args.out, args.finish) for run in args.runs]
    say('iterations: ' + ', '.join(f'{run.name} {run.total}' for run in runs))
    rows = []
    for point in range(1, args.points + 1):
        go(runs, point / args.points)
        for run in runs:
            row = dict(name=run.name, iteration=run.done)
            row.update({f'PSNR {name}': round(run.psnr(pictures), 4) for name, pictures in sets.items()})
            rows.append(row)
            run.save()
            say(f'{row} {run.loss()}')
        with open(Path(args.out, 'psnr.csv'), 'w', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main()
