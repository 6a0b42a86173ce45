"""Combines trained networks into a routed network and measures it: what `basicsr route` does."""
from __future__ import annotations

import copy
import math
import numpy as np
import tempfile
import time
import torch
from pathlib import Path
from torch import nn
from tqdm import tqdm
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from basicsr.archs import build_network
from .archs import ErrorMap
from .complexity import count_macs
from .evaluation import photographs_in, read_lq, read_pairs, to_image, to_tensor
from .files import replace_when_done
from .inference import TileUpscaler, default_patch_size
from .inference.network import common_geometry, run_padded
from .inference.speed import is_out_of_memory
from .inference.tiling import TensorRows
from .losses import squared_error
from .memory import peak_mib
from .options import OptionError
from .router import (
    LEAST_PRICE,
    MOST_MARGIN,
    SIDE,
    Example,
    Goal,
    chosen,
    decibels,
    margin_of,
    price_for,
    routed_errors,
    total_of,
    train_router,
)

FIDELITY, MAX_LOSS = 45., 0.02  # dB
PART = 160  # side of a part that the branches run on, in pixels: a multiple of the windows of transformers
VIEW = 512  # largest side of what is measured at the end
FIRST_PARTS, MOST_PARTS = 64, 256  # the number is doubled as long as that makes a difference
ENOUGH = 0.01  # twice as many parts must lower the sum of errors and costs by this fraction
HELD_BACK = 3  # one in so many photographs (or parts, if there are fewer photographs) is not learnt from
MOST_PHOTOGRAPHS, MOST_VIEWS = 256, 6
LONG_PASS = 30.  # seconds of the heavy network on all that is measured
DIFFERENT = 1.5  # ratio of two relative times, in tiles and alone, from which they count as different
MISSED = 0.5  # dB of fidelity: less is chance
HARDLY = 0.005  # fraction of the area that counts as nothing
PAYS = 1.25  # speed relative to the heavy network; a smaller gain is not worth two networks

Photograph = Tuple[np.ndarray, Optional[np.ndarray]]
Say = Callable[[str], None]


class Part(NamedTuple):
    """A part of a photograph.

    Attributes:
        lq: uint8 RGB of shape (h, w, 3).
        gt: Ground truth of shape (h*scale, w*scale, 3), or None.
        weight: Pixels of the photograph that one pixel of the part represents.
    """
    lq: np.ndarray
    gt: Optional[np.ndarray]
    weight: float


class Sample:
    """Parts of photographs in a temporary folder, some to learn from, others held back.

    Args:
        photographs: LQ images, and their ground truth or None. Images that are too small are skipped.
        count: Largest number of photographs.
        scale: Upsampling factor.
        unit: Number of which the sides of parts must be multiples.
        folder: An empty folder.
        with_gt: Whether parts include their ground truth.

    Attributes:
        photographs: Number of photographs used.
        apart: Whether the parts held back come from other photographs than those learnt from.
        learnt, held_back: Numbers of parts: first one part of each photograph, then a second one of each, ...
        views: Numbers of larger parts, to measure on.
    """

    def __init__(self, photographs: Iterable[Photograph], count: int, scale: int, unit: int, folder: str,
                 with_gt: bool) -> None:
        self.folder, self.scale, self.photographs = Path(folder), scale, 0
        generator, each = np.random.default_rng(0), -(-MOST_PARTS // count)
        stride = HELD_BACK * max(1, count // (HELD_BACK * MOST_VIEWS))
        parts: list[tuple[int, int]] = []  # of each part, its number in its photograph, and the photograph's number
        views: list[int] = []
        for lq, gt in photographs:
            size = lq.shape[:2]
            if min(size) < least_side(unit):
                continue
            boxes = boxes_in(size, PART, unit, generator)[:each]
            for number, box in enumerate(boxes):
                area = (box[1] - box[0]) * (box[3] - box[2])
                self._keep(f'part{len(parts)}', lq, gt if with_gt else None, box, size[0] * size[1] / len(boxes) / area)
                parts.append((number, self.photographs))
            if self.photographs < HELD_BACK or (self.photographs + 1) % stride == 0:
                self._keep(f'view{self.photographs}', lq, gt, boxes_in(size, VIEW, unit, generator)[0], 1.)
                views.append(self.photographs)
            self.photographs += 1
        self.apart = self.photographs >= HELD_BACK
        back = [(photograph if self.apart else i) % HELD_BACK == HELD_BACK - 1
                for i, (_, photograph) in enumerate(parts)]
        order = sorted(range(len(parts)), key=parts.__getitem__)
        self.learnt, self.held_back = ([i for i in order if back[i] is kept] for kept in (False, True))
        self.views = [i for i in views if not self.apart or i % HELD_BACK == HELD_BACK - 1][:MOST_VIEWS]

    def _keep(self, name: str, lq: np.ndarray, gt: Optional[np.ndarray], box: Sequence[int], weight: float) -> None:
        top, bottom, left, right = box
        content = dict(lq=lq[top:bottom, left:right], weight=weight)
        if gt is not None:
            top, bottom, left, right = (self.scale * edge for edge in box)
            content.update(gt=gt[top:bottom, left:right])
        np.savez(self.folder / f'{name}.npz', **content)

    def _read(self, name: str) -> Part:
        with np.load(self.folder / f'{name}.npz') as content:
            gt = content['gt'] if 'gt' in content else None
            return Part(content['lq'], gt, float(content['weight']))

    def part(self, number: int) -> Part:
        return self._read(f'part{number}')

    def view(self, number: int) -> Part:
        return self._read(f'view{number}')


def least_side(unit: int) -> int:
    """The smallest side of a photograph from which parts can be learnt: one cell more on each side."""
    return -(-(SIDE + 2) * ErrorMap.cell // unit) * unit


def boxes_in(size: Sequence[int], side: int, unit: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    """Parts of an image that do not overlap, in random order, each as top, bottom, left and right."""
    edges = []
    for length in size:
        part = min(side, length) // unit * unit
        first = generator.integers(length % part + 1)
        edges.append([(int(start), int(start) + part) for start in range(first, length - part + 1, part)])
    boxes = [rows + columns for rows in edges[0] for columns in edges[1]]
    return [boxes[i] for i in generator.permutation(len(boxes))]


def middle_of(size: Sequence[int], side: int, unit: int) -> tuple[int, ...]:
    """The largest part in the middle of an image with sides of at most `side`."""
    box: tuple[int, ...] = ()
    for length in size:
        part = min(side, length) // unit * unit
        box += ((length - part) // 2, (length - part) // 2 + part)
    return box


def joined(blocks: Sequence[Mapping[str, Any]],
           nets: Sequence[nn.Module],
           reference: str = 'gt') -> tuple[nn.Module, dict[str, Any]]:
    """Combines trained networks into a CDNSR with a new ErrorMap; returns it and its option block.

    Args:
        blocks: Option block of each branch, the hardest last.
        nets: The networks.
        reference: What errors are measured against; see Goal.

    Raises:
        ValueError: They differ in scale or channels.
    """
    scale, channels, _ = common_geometry(nets)
    classifier = dict(type='ErrorMap', num_in_ch=channels, num_classes=len(nets), reference=reference)
    block = dict(type='CDNSR', branches=copy.deepcopy(list(blocks)), classifier=classifier, upscale=scale)
    net = build_network(copy.deepcopy(block))
    for branch, trained in zip(net.branches, nets):
        branch.load_state_dict(trained.state_dict())
    return net.eval(), block


@torch.inference_mode()
def example_of(engine: TileUpscaler, part: Part, reference: str) -> Example:
    """Runs all branches on a part of a photograph and returns their errors for all cells but the outermost, where the
    networks see zeros instead of the photograph.

    Args:
        engine: Engine of the routed network, whose classifier is an ErrorMap.
        part: The part.
        reference: See Goal.
    """
    mapper: Any = engine.classifier
    x = to_tensor(part.lq, engine.channels).to(engine.device)
    made = [engine.run(i, x.contiguous(memory_format=torch.channels_last)) for i in range(engine.num_classes)]
    if reference == 'hardest':
        target = made[-1].float().clamp(0, 1)
    else:
        assert part.gt is not None
        target = to_tensor(part.gt, engine.channels).to(engine.device)
    errors = torch.cat([squared_error(image, target, int(mapper.cell * engine.scale)) for image in made])
    energies = torch.cat([mapper.energies(x), mapper.energies(x.transpose(2, 3)).transpose(2, 3)])
    inner = np.s_[..., 1:-1, 1:-1]
    return Example(energies[inner].cpu().clone(), errors[inner].cpu(), part.weight)


class Row(NamedTuple):
    """One row of what was measured on parts of photographs that were held back.

    Attributes:
        name: Name of a network, or the goal of routing.
        seconds: Time for all parts.
        fidelity: PSNR in dB relative to the heavy network's image; for routing, its image from the same tiles.
        whole: PSNR relative to the heavy network's image without tiles; NaN if unknown.
        psnr: PSNR relative to the ground truth; NaN if there is none.
        price: Price of routing; None for a network.
        shares: Fraction of the parts' area that each branch gets.
    """
    name: str
    seconds: float
    fidelity: float
    whole: float
    psnr: float
    price: Optional[float] = None
    shares: tuple[float, ...] = ()


class Routed(NamedTuple):
    """A routed network and its measurements.

    Attributes:
        net: The network, in evaluation mode.
        block: Its option block.
        goal: The goal that its price was chosen for.
        photographs: Number of photographs.
        apart: Whether the parts held back come from other photographs than those learnt from.
        parts: Number of parts learnt from, and of parts held back.
        rows: The heavy network in BasicSR, then in the engine; the lighter networks; routing.
        chosen: Index of the row with the network's price.
        curve: For many prices, time relative to the heavy network, without overlap, and PSNR relative to its image.
        worst: The square where routing differs most: the heavy network's image and the routed one, uint8 RGB.
    """
    net: nn.Module
    block: dict[str, Any]
    goal: Goal
    photographs: int
    apart: bool
    parts: tuple[int, int]
    rows: list[Row]
    chosen: int
    curve: list[tuple[float, float]]
    worst: tuple[np.ndarray, np.ndarray]


def route(blocks: Sequence[Mapping[str, Any]],
          nets: Sequence[nn.Module],
          names: Sequence[str],
          folder: str,
          goal: Goal = Goal('hardest', FIDELITY),
          limit: Optional[int] = None,
          device: Optional[torch.device] = None,
          left_out: Optional[list[tuple[str, str]]] = None,
          say: Say = lambda text: None,
          **kwargs: Any) -> Routed:
    """Combines trained networks into a routed network and measures it.

    Args:
        blocks, nets: See `joined`.
        names: Names of the networks in the table.
        folder: Images like those to upscale, or a folder with lq/ and gt/; for a goal relative to the ground truth,
            photographs, which are downscaled, or such a folder.
        goal: What errors are measured against, and the limit for all photographs together.
        limit: Largest number of photographs.
        device: Where the networks run. Default: the CPU.
        left_out: See read_pairs.
        say: Called with a line that says how long it will take.
        kwargs: Arguments of TileUpscaler, such as the precision.

    Raises:
        OptionError: The photographs cannot be used.
        ValueError: The networks cannot be combined.
    """
    *lighter, heavy = range(len(nets))
    order = [*sorted(lighter, key=lambda i: count_macs(nets[i], PART, PART, common_geometry(nets)[1])), heavy]
    blocks, nets, names = ([given[i] for i in order] for given in (blocks, nets, names))
    net, block = joined(blocks, nets, goal.reference)
    net.to(device or 'cpu')
    mapper: Any = net.classifier
    engine = TileUpscaler(net, default_patch_size(net), cost='latency', **kwargs)
    unit = math.lcm(mapper.cell, engine.multiple)
    with tempfile.TemporaryDirectory() as place:
        reading = (folder, block['upscale'], limit, left_out, MOST_PHOTOGRAPHS)
        photographs: Iterable[Photograph] = read_lq(*reading)
        if goal.reference == 'gt':
            photographs = ((pair.lq, pair.gt) for pair in read_pairs(*reading))
        count = photographs_in(folder, limit, MOST_PHOTOGRAPHS)
        photographs = tqdm(photographs, 'photographs', count, unit='', disable=None)
        sample = Sample(photographs, count, block['upscale'], unit, place, goal.reference == 'gt')
        if not sample.photographs:
            least = least_side(unit) * (1 if goal.reference == 'hardest' else block['upscale'])
            raise OptionError(folder, f'contains no photograph of at least {least} pixels on each side to learn from')
        examples = learn(engine, mapper, sample, goal, say)
        held_back = [examples[i] for i in sample.held_back if i in examples]
        curve = curve_of(mapper, held_back or list(examples.values()), engine.costs.double())
        rows, worst = measure(engine, mapper, names, sample, examples, goal, **kwargs)
        block['classifier'].update(price=mapper.price, margin=mapper.margin)
    at = next(i for i, row in enumerate(rows) if row.price == mapper.price)
    return Routed(net, block, goal, sample.photographs, sample.apart, (len(examples) - len(held_back), len(held_back)),
                  rows, at, curve, worst)


def learn(engine: TileUpscaler, mapper: Any, sample: Sample, goal: Goal, say: Say) -> dict[int, Example]:
    """Runs the branches on more and more parts, and trains the router each time, until more parts no longer help.

    Returns:
        The examples of the parts that were run, by number.
    """
    speed, side = engine.measure_speed(fresh=True), PART / engine.patch_size
    seconds = sum(speed.tile_ms[:engine.num_classes]) / 1000 * side**2
    total = min(MOST_PARTS, len(sample.learnt) + len(sample.held_back))
    first = min(FIRST_PARTS, total)
    side = view_side(engine, len(sample.views)) / engine.patch_size
    passes = 7 * len(sample.views) * speed.tile_ms[engine.num_classes - 1] / 1000 * side**2
    parts, time_ = f'{first} to {total}', f'{duration(first * seconds)} to {duration(total * seconds)}'
    if first == total:
        parts, time_ = str(total), duration(total * seconds)
    say(f'{sample.photographs} photographs; the networks run on {parts} parts of {PART}x{PART} pixels, which takes '
        f'{time_}, and measuring at the end about {duration(passes)}.')
    examples: dict[int, Example] = {}
    fresh = copy.deepcopy(mapper.state_dict())
    before: Optional[dict[str, Any]] = None
    count = first
    while True:
        wanted = [*sample.learnt[:count - count // HELD_BACK], *sample.held_back[:max(1, count // HELD_BACK)]]
        for number in tqdm([i for i in wanted if i not in examples], 'branches', unit='part', disable=None):
            examples[number] = example_of(engine, sample.part(number), goal.reference)
            if len(examples) == 1:
                say(f'Memory: {peak_mib(engine.device.type == "cuda"):.0f} MiB; more parts need no more.')
        mapper.load_state_dict(fresh)
        train_router(mapper, [examples[i] for i in sample.learnt if i in examples])
        set_price(mapper, examples, sample, engine.costs.double(), goal)
        known = [examples[i] for i in sample.held_back if i in examples] or list(examples.values())
        now, state = spent(mapper, known, engine.costs.double()), copy.deepcopy(mapper.state_dict())
        if before is not None:
            mapper.load_state_dict(before)
            then = spent(mapper, known, engine.costs.double())
            mapper.load_state_dict(state)
            if now > (1 - ENOUGH) * then:
                break
        if len(examples) >= total or count >= total:
            break
        before, count = state, min(2 * count, total)
    return examples


def set_price(mapper: Any, examples: Mapping[int, Example], sample: Sample, costs: torch.Tensor, goal: Goal) -> None:
    """Sets the margin of an ErrorMap's predictions, from the parts held back, and the price that meets the goal."""
    predicted, _, sizes = routed_errors(mapper, list(examples.values()))
    held_back = [examples[i] for i in sample.held_back if i in examples]
    mapper.margin = 1.
    if held_back:
        mapper.margin = margin_of(*routed_errors(mapper, held_back), costs, price_for(predicted, sizes, costs, goal),
                                  goal)
    mapper.price = price_for(predicted, sizes, costs, goal.asked(mapper.margin))


def spent(mapper: Any, examples: Sequence[Example], costs: torch.Tensor) -> float:
    """Mean of error + price * cost after routing."""
    predicted, errors, sizes = routed_errors(mapper, examples)
    classes = chosen(predicted, mapper.price, costs)
    return (total_of(errors, sizes, classes) + mapper.price * float(
        (costs[classes] * sizes).sum())) / float(sizes.sum())


def view_side(engine: TileUpscaler, count: int) -> int:
    """Side of `count` views on which the heavy network does not take too long."""
    seconds = engine.speed.tile_ms[engine.num_classes - 1] / 1000 / engine.patch_size**2  # of a pixel
    return max(PART, min(VIEW, int((LONG_PASS / seconds / count)**0.5)))


def measure(engine: TileUpscaler, mapper: Any, names: Sequence[str], sample: Sample, examples: Mapping[int, Example],
            goal: Goal, **kwargs: Any) -> tuple[list[Row], tuple[np.ndarray, np.ndarray]]:
    """Runs the networks and the routed one on parts of photographs that were held back; corrects margin and price if
    routing misses its goal there.

    Returns:
        `rows` and `worst` of Routed.
    """
    heavy, scale = engine.num_classes - 1, int(engine.scale)
    unit = math.lcm(mapper.cell, engine.multiple)
    side = view_side(engine, len(sample.views))
    inputs, truths = [], []
    for view in map(sample.view, sample.views):
        top, bottom, left, right = middle_of(view.lq.shape[:2], side, unit)
        inputs.append(to_tensor(view.lq[top:bottom, left:right], engine.channels).to(engine.device))
        top, bottom, left, right = (scale * edge for edge in (top, bottom, left, right))
        truths.append(None if view.gt is None else to_tensor(view.gt[top:bottom, left:right], engine.channels))
    known = None if truths[0] is None else [to_image(truth) for truth in truths if truth is not None]
    source = copy.deepcopy(engine.sources[heavy]).eval()

    @torch.inference_mode()
    def plainly(x: torch.Tensor) -> torch.Tensor:
        made = run_padded(source, x, scale, engine.multiple)
        return made.cpu() if made.is_cuda else made  # as BasicSR does, so that times compare

    def timed(upscale: Callable[[torch.Tensor], torch.Tensor], name: str) -> tuple[float, list[np.ndarray]]:
        upscale(inputs[0][..., :PART, :PART])  # the first run is slower
        times: list[float] = []
        images: list[np.ndarray] = []
        while not times or len(times) < 3 and sum(times) < LONG_PASS / 4:
            begin, images = time.perf_counter(), []
            results = [upscale(x) for x in tqdm(inputs, name, unit='part', disable=None, leave=False)]
            times.append(time.perf_counter() - begin)
            images = [to_image(result) for result in results]
        return min(times), images

    made = [timed(alone_in(engine.sources[i], **kwargs), names[i]) for i in range(engine.num_classes)]
    whole: Optional[list[np.ndarray]] = None
    seconds = math.nan
    try:
        seconds, whole = timed(plainly, names[heavy])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise

    def row_of(name: str, taken: float, images: Sequence[np.ndarray], target: Sequence[np.ndarray], *routing:
               Any) -> Row:
        return Row(name, taken, pooled(images, target), pooled(images, whole), pooled(images, known), *routing)

    for i, (seconds_, _) in enumerate(made):
        ratio = seconds_ / made[heavy][0] / (engine.costs[i] / engine.costs[heavy])
        if not 1 / DIFFERENT < ratio < DIFFERENT:  # the machine was busy when tiles were measured, or is now
            engine.measure_speed(fresh=True)
            break
    mapper.costs.copy_(engine.costs)
    target = made[heavy][1]
    rows = [row_of(names[i], *made[i], target) for i in reversed(range(engine.num_classes))]
    rows.insert(0, row_of(f'{names[heavy]}, as BasicSR runs it', seconds, whole or target, target))
    predicted, _, sizes = routed_errors(mapper, list(examples.values()))

    def routed(aim: Goal) -> tuple[Row, list[np.ndarray], list[np.ndarray]]:
        price = price_for(predicted, sizes, engine.costs.double(), aim.asked(mapper.margin))
        engine.price, counts, others = price, torch.zeros(engine.num_classes), []
        taken, images = timed(lambda x: engine.upscale(x).image, f'routed, {aim}')
        for x in tqdm(inputs, f'{names[heavy]} in the same tiles', unit='part', disable=None, leave=False):
            plan = engine.plan(TensorRows(x))
            counts += torch.bincount(plan.class_map().flatten().long(), minlength=len(counts))
            strips = [[(heavy, block) for _, block in strip] for strip in plan.strips]
            others.append(to_image(engine.upscale(x, plan._replace(strips=strips)).image))
        shares = tuple((counts / counts.sum()).tolist())
        return row_of(f'routed, {aim}', taken, images, others, price, shares), images, others

    row, images, others = routed(goal)
    if goal.reference == 'hardest' and row.fidelity < goal.decibels and row.shares[-1] < 1:
        mapper.margin = min(MOST_MARGIN, mapper.margin * 10**((goal.decibels - row.fidelity) / 10))
        row, images, others = routed(goal)
    mapper.price = row.price
    rows += [row if aim == goal else routed(aim)[0] for aim in goal.around()]
    engine.price = None
    return rows, farthest(others, images, 64 * scale)


def alone_in(net: nn.Module, **kwargs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that upscales images with a network alone in the engine."""
    engine = TileUpscaler(net, **kwargs)
    return lambda x: cast(torch.Tensor, engine.upscale(x).image)


def pooled(images: Sequence[np.ndarray], others: Optional[Sequence[np.ndarray]]) -> float:
    """PSNR of images relative to others, over all pixels together; NaN without others."""
    if others is None:
        return math.nan
    squares = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(images, others))
    return decibels(255**2, squares / sum(image.size for image in images)) if squares else math.inf


def farthest(images: Sequence[np.ndarray], others: Sequence[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
    """The square where two series of images differ most, from both."""
    best, pair = -1., (images[0], others[0])
    for image, other in zip(images, others):
        rows, columns = (max(1, length // side) for length in image.shape[:2])
        for top in range(0, rows * side, side):
            for left in range(0, columns * side, side):
                area = np.s_[top:top + side, left:left + side]
                difference = float(np.square(image[area].astype(np.float64) - other[area]).mean())
                if difference > best:
                    best, pair = difference, (image[area], other[area])
    return pair


def curve_of(mapper: Any, examples: Sequence[Example], costs: torch.Tensor) -> list[tuple[float, float]]:
    """For many prices, time relative to the heavy network, without overlap, and PSNR against the router's reference."""
    predicted, errors, sizes = routed_errors(mapper, examples)
    points = {}
    for price in np.geomspace(LEAST_PRICE, 255**2, 60):
        classes = chosen(predicted, price, costs)
        time_ = float((costs[classes] * sizes).sum() / sizes.sum() / costs[-1])
        points[time_] = decibels(255**2, total_of(errors, sizes, classes) / float(sizes.sum()))
    return sorted(points.items())


def markdown(routed: Routed) -> str:
    """The measurements as a Markdown table."""
    with_gt = not all(math.isnan(row.psnr) for row in routed.rows)
    basic, heavy = routed.rows[:2]
    head = ['', 'price', 'shares in %', f'time relative to {heavy.name}', 'relative to BasicSR']
    head += ['dB relative to its image', 'to its image without tiles']
    lines = [head + ['to GT'] * with_gt, ['---'] * (len(head) + with_gt)]
    for row in routed.rows:
        price = '' if row.price is None else f'{row.price:.3g}'
        shares = ' / '.join(f'{100 * share:.0f}' for share in row.shares)
        cells = [row.name, price, shares, f'{row.seconds / heavy.seconds:.2f}', f'{row.seconds / basic.seconds:.2f}']
        cells += [f'{row.fidelity:.2f}', f'{row.whole:.2f}'] + [f'{row.psnr:.3f}'] * with_gt
        lines.append(cells)
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def verdict(routed: Routed) -> str:
    """The result in one sentence, and in another one that the goal was missed."""
    basic, heavy, *others = routed.rows
    row, lighter = routed.rows[routed.chosen], others[:len(others[-1].shares) - 1]
    seconds = min(basic.seconds, heavy.seconds) if basic.seconds > 0 else heavy.seconds
    times = seconds / row.seconds
    if routed.goal.reference == 'hardest':
        at, missed = f'at {row.fidelity:.1f} dB relative to its image', row.fidelity < routed.goal.decibels - MISSED
    else:
        lost = heavy.psnr - row.psnr
        at = f'at {abs(lost):.3f} dB {"below" if lost >= 0 else "above"} it'
        missed = lost > 2 * routed.goal.decibels
    more = (
        f' That misses {routed.goal}: the photographs that were held back differ from those learnt from; give more, '
        'of more kinds.') if missed else ''
    if row.shares[-1] < HARDLY:
        higher = '--fidelity above' if routed.goal.reference == 'hardest' else '--max-loss below'
        return (f'{lighter[0].name} alone is enough: {times:.1f} times as fast as {heavy.name}, {at}; there is nothing '
                f'to route. For a higher quality, give {higher} {routed.goal.decibels:g}.{more}')
    if times >= PAYS:
        return f'{times:.1f} times as fast as {heavy.name}, {at}.{more}'
    return (f'Does not pay with {" and ".join(other.name for other in lighter)}: at {routed.goal}, '
            f'{100 * row.shares[-1]:.0f} % of the area needs {heavy.name}, and it is {times:.2f} times as fast.{more}')


def draw(routed: Routed, path: Path) -> None:
    """Plots PSNR over time, and the square where the routed image differs most from the heavy network's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heavy, row, to_heavy = routed.rows[1], routed.rows[routed.chosen], routed.goal.reference == 'hardest'
    figure = Figure(figsize=(14, 5), layout='constrained')
    FigureCanvasAgg(figure)
    axes, *crops = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    measured = [(other.seconds / heavy.seconds, other.fidelity if to_heavy else other.psnr, other)
                for other in routed.rows[1:]]
    for x, y, other in measured:
        if other.price is None and math.isfinite(y):
            axes.plot(x, y, 's', label=other.name)
    points = [(x, y) for x, y, other in measured if other.price is not None]
    axes.plot(*zip(*points), 'o-', color='k', label='routed')
    for point, aim in zip(points, routed.goal.around()):
        axes.annotate(f'{aim}  ', point, fontsize=8, ha='right', va='bottom')
    if to_heavy:  # the heavy network itself is at infinity
        shown = [point for point in routed.curve if point[1] < points[0][1] + 5]
        axes.plot(*zip(*shown), ':', color='k', label='routed, parts held back, without overlap')
    axes.set(xlabel=f'time relative to {heavy.name}', xlim=(0, 1.1 * max(x for x, y, _ in measured)))
    axes.set_ylabel(f'dB relative to {f"the image of {heavy.name}" if to_heavy else "the ground truth"}')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc='lower right')
    psnr = pooled(routed.worst[:1], routed.worst[1:])
    titles = (heavy.name, f'{row.name}: {psnr:.1f} dB here, where it differs most')
    for place, image, title in zip(crops, routed.worst, titles):
        place.imshow(image if image.shape[2] == 3 else image[..., 0], cmap='gray', vmin=0, vmax=255)
        place.set_title(title, fontsize=9)
        place.axis('off')
    figure.suptitle(verdict(routed), fontsize=10)
    with replace_when_done(path) as temporary:
        figure.savefig(temporary, dpi=110)


def duration(seconds: float) -> str:
    """A duration as text."""
    if seconds < 90:
        return f'{max(1, round(seconds))} s'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'
