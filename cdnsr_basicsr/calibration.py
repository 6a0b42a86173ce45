"""Measures the speed of a routed network's branches on this machine and PSNR over budgets, and keeps both beside the
model."""
from __future__ import annotations

import hashlib
import json
import math
import tempfile
import torch
from pathlib import Path
from torch import nn
from tqdm import tqdm
from typing import Any, NamedTuple, Optional, Sequence

from .evaluation import PairStore, quality_of, to_tensor
from .files import make_writable, replace_when_done
from .inference import TileUpscaler
from .inference.network import branches_of, routed
from .inference.speed import Speed, machine
from .inference.tiling import PATCH_SIZE
from .machine import cache_folder
from .options import OptionError
from .zoo import find_checkpoint, is_shipped

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
MOST_LOSS = 0.02  # dB that half precision may cost a branch


class Point(NamedTuple):
    """Means over the photographs at one budget; None is the published rule.

    Attributes:
        budget: What was allowed, of the hardest branch's MACs on whole images.
        cost: What was spent of it, classifier and tile overlap included.
        psnr: In dB, of RGB, or of the luma of a network for gray images, `scale` pixels of border left out.
        ms: Milliseconds per megapixel of the result.
    """
    budget: Optional[float]
    cost: float
    psnr: float
    ms: float


class Calibration(NamedTuple):
    """The table beside a model.

    Attributes:
        network: The branches, as PyTorch describes them, and their weights' sha256.
        machine: What the times were measured on.
        precision: Of the branches.
        patch_size, step: Of the tiles.
        photographs: How many there were.
        max_tiles, tile_ms: See Speed; of the branches, then the classifier.
        branch_psnr: PSNR of each branch on all tiles, in dB.
        float32_branches: Branches that lose more than 0.02 dB in this precision, or overflow in it: they keep float32.
        points: Budgets.
    """
    network: list[str]
    machine: str
    precision: str
    patch_size: int
    step: int
    photographs: int
    max_tiles: list[int]
    tile_ms: list[float]
    branch_psnr: list[float]
    float32_branches: list[int]
    points: list[Point]

    @property
    def hardest(self) -> int:
        """The branch that leaves the least error."""
        return max(range(len(self.branch_psnr)), key=self.branch_psnr.__getitem__)

    def content(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dict(self._asdict(), points=[point._asdict() for point in self.points])


def calibration_path(model: str) -> Path:
    """Beside the checkpoint; in the user's cache folder if the checkpoint is one of this package."""
    path = Path(find_checkpoint(model)).with_suffix('.calibration.json')
    return cache_folder() / path.name if is_shipped(str(path)) else path


def read_calibration(model: str, net: nn.Module, precision: str, patch_size: int) -> Optional[Calibration]:
    """The table beside a model, if there is one for this network, precision and size of tiles.

    Raises:
        OptionError: It cannot be understood.
    """
    path = calibration_path(model)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        table = Calibration(**dict(content, points=[Point(**point) for point in content['points']]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OptionError(str(path), f'is not a calibration ({error}); remove it, or calibrate again') from error
    fits = (table.precision, table.patch_size) == (precision, patch_size)
    return table if fits and routed(net) is not None and table.network == describe(net) else None


def describe(net: nn.Module) -> list[str]:
    """Identifies the branches that a table belongs to: another model may have had the same name before."""
    described = []
    for branch in branches_of(net):
        weights = hashlib.sha256()
        for value in branch.state_dict().values():
            weights.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
        described.append(f'{branch}, weights {weights.hexdigest()[:16]}')
    return described


def speed_of(calibration: Calibration, upscaler: TileUpscaler) -> Optional[Speed]:
    """The measured speed, if it was measured on this machine and for such tiles."""
    patch_size = -(-calibration.patch_size // upscaler.multiple) * upscaler.multiple
    if (calibration.machine, patch_size) != (machine(upscaler.device), upscaler.patch_size):
        return None
    return Speed(calibration.max_tiles, calibration.tile_ms)


def calibrate(net: nn.Module,
              model: str,
              data: str,
              precision: str = 'float32',
              budgets: Sequence[float] = BUDGETS,
              patch_size: int = PATCH_SIZE,
              step: Optional[int] = None,
              limit: Optional[int] = None,
              left_out: Optional[list[tuple[str, str]]] = None) -> Calibration:
    """Measures a CDNSR network on photographs and writes the table beside its checkpoint.

    Args:
        net: The network, on its device, in evaluation mode.
        model: Its checkpoint, or its name.
        data: Folder of photographs; see read_pairs.
        precision: Of the branches; those that it costs more than 0.02 dB, or that overflow in it, keep float32.
        budgets: Budgets to try, besides the published rule.
        patch_size: Largest side of a tile.
        step: patch_size minus the overlap of tiles.
        limit: Most photographs. Default: all.
        left_out: See read_pairs.

    Raises:
        OptionError: The network has no branches, or the folder cannot be used.
    """
    branches = branches_of(net)
    if routed(net) is None:
        raise OptionError(model, f'{type(net).__name__} has no branches to choose from')
    try:
        plain = TileUpscaler(net, patch_size, step, budget=1)
    except ValueError as error:
        raise OptionError(model, str(error)) from error
    path = calibration_path(model)
    make_writable(path.parent)
    step, scale = plain.step, plain.scale
    with tempfile.TemporaryDirectory() as folder, tqdm(desc='calibrate', unit='photograph', disable=None) as bar:
        pairs = PairStore(folder, data, scale, limit, left_out)
        photographs = len(pairs.sizes)

        def measure(upscaler: TileUpscaler) -> Point:
            psnr = cost = seconds = 0.
            for number in range(photographs):
                lq = to_tensor(pairs.lq(number), plain.channels).to(upscaler.device)
                upscaled = min((upscaler.upscale(lq) for _ in range(2)), key=lambda result: result.seconds)
                psnr += quality_of(upscaled.image, pairs.gt(number), scale, with_ssim=False)[0]
                cost += upscaled.cost
                seconds += upscaled.seconds
                bar.update()
            return Point(upscaler.budget, cost / photographs, psnr / photographs, 1000 * seconds / pairs.megapixels)

        psnrs = {
            kind: [measure(TileUpscaler(branch, patch_size, step, precision=kind)).psnr for branch in branches]
            for kind in dict.fromkeys(('float32', precision))
        }
        for i, psnr in enumerate(psnrs['float32']):
            if math.isnan(psnr):
                raise OptionError(model, f'branch {i} computes values that are not finite')
        kept = [
            i for i, (exact, half) in enumerate(zip(psnrs['float32'], psnrs[precision]))
            if not half >= exact - MOST_LOSS
        ]  # also of what has overflowed
        branch_psnr = [psnrs['float32' if i in kept else precision][i] for i in range(len(branches))]
        points = [
            measure(TileUpscaler(net, patch_size, step, budget, precision=precision, float32_branches=kept))
            for budget in (None, *budgets)
        ]
    upscaler = TileUpscaler(net, patch_size, step, precision=precision, float32_branches=kept)
    table = Calibration(
        describe(net), machine(upscaler.device), precision, patch_size, step, photographs,
        *upscaler.measure_speed(fresh=True), branch_psnr, kept, points)
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(table.content(), indent=1) + '\n', encoding='utf-8')
    return table


def markdown(table: Calibration) -> str:
    """The table as Markdown."""
    text = (f'{table.photographs} photograph{"s" * (table.photographs != 1)}, {table.precision}, tiles of at most '
            f'{table.patch_size}; {table.machine}\n\n'
            '| part | ms per tile | tiles per pass | PSNR alone |\n| --- | --- | --- | --- |\n')
    for i, psnr in enumerate(table.branch_psnr):
        note = ' (float32)' if i in table.float32_branches else ''
        text += f'| branch {i}{note} | {table.tile_ms[i]:.3f} | {table.max_tiles[i]} | {psnr:.3f} |\n'
    text += f'| classifier | {table.tile_ms[-1]:.3f} | | |\n\n'
    text += '| budget | cost | PSNR | ms/megapixel |\n| --- | --- | --- | --- |\n'
    for point in table.points:
        budget = '-' if point.budget is None else f'{point.budget:g}'
        text += f'| {budget} | {point.cost:.3f} | {point.psnr:.3f} | {point.ms:.1f} |\n'
    return text
