"""Makes a routed network of networks that are trained already, and teaches its ErrorMap which of them errs where."""
from __future__ import annotations

import copy
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Sequence

from basicsr.archs import build_network
from .evaluation import Pair, read_pairs, to_tensor
from .inference import TileUpscaler, default_patch_size
from .inference.budget import turning_price
from .inference.network import branches_of, common_geometry
from .losses import ErrorLoss, squared_error
from .options import OptionError

SIDE = 16  # of what is learnt from at once, in cells
CELLS = (1, 2, 4)  # cells whose mean is learnt together, each way: what is asked for is the mean of some
ROUTED = 4  # cells on each side of what gets a class of its own, about: by these a price is found
HELD_BACK = 5  # of so many photographs one is not learnt from
MAX_LOSS = 0.02  # dB that routing may cost
MOST_MARGIN = 3  # of few photographs more would be chance
CONTRAST = 0.4  # pictures get between exp(-CONTRAST) and exp(CONTRAST / 2) of theirs; errors go with its square


class Example(NamedTuple):
    """A photograph as a router sees it.

    Attributes:
        energies: of shape (2, C, h, w), of the photograph and of the transposed one, transposed back.
        errors: of shape (M, h, w), mean squared error of each branch in each cell, in grey levels.
    """
    energies: torch.Tensor
    errors: torch.Tensor


@torch.inference_mode()
def examples_of(net: nn.Module, pairs: Iterable[Pair], **kwargs: Any) -> list[Example]:
    """Runs all branches on photographs and keeps how far they are from what is to be made.

    Args:
        net: The routed network, whose classifier is an ErrorMap.
        pairs: Photographs; those whose LQ image has less than 128 pixels on a side are left out.
        kwargs: Of TileUpscaler, such as the precision.
    """
    mapper: Any = net.classifier
    engines = [TileUpscaler(branch, **kwargs) for branch in branches_of(net)]
    cell, examples = mapper.cell, []
    for _, lq, gt in pairs:
        if min(lq.shape[:2]) < SIDE * cell:
            continue
        x, target = (to_tensor(image, engines[0].channels).to(engines[0].device) for image in (lq, gt))
        side = int(cell * engines[0].scale)
        errors = torch.cat([squared_error(engine.upscale(x).image, target, side) for engine in engines])
        plain, turned = mapper.energies(x), mapper.energies(x.transpose(2, 3)).transpose(2, 3)
        energies = torch.cat([plain, turned])[..., :errors.shape[1], :errors.shape[2]]
        examples.append(Example(energies.cpu().clone(), errors.cpu()))
    return examples


def drawn(examples: Sequence[Example], shares: np.ndarray,
          generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies and errors of a part of a photograph, in one of eight orientations and of another contrast."""
    energies, errors = examples[generator.choice(len(examples), p=shares)]
    top, left = (generator.integers(length - SIDE + 1) for length in errors.shape[1:])
    area = np.s_[:, top:top + SIDE, left:left + SIDE]
    flips = [dim for dim in (1, 2) if generator.random() < 0.5]
    change = generator.uniform(-CONTRAST, CONTRAST / 2)
    part = energies[generator.integers(2)][area]
    return part.flip(flips) + 2 * change, errors[area].flip(flips) * np.exp(2 * change)


def train_router(mapper: Any,
                 examples: Sequence[Example],
                 iterations: int = 800,
                 batch: int = 16,
                 seed: int = 0) -> None:
    """Trains an ErrorMap, on the CPU; its weights become a running mean of those on the way.

    Args:
        mapper: The ErrorMap.
        examples: What to learn from; each pixel of it is about equally likely to be drawn.
        iterations, batch: How long, and how many parts at once.
        seed: Of the parts that are drawn.
    """
    if not examples:
        raise ValueError(f'expected photographs of at least {SIDE * mapper.cell} pixels on each side')
    device = next(mapper.parameters()).device
    mapper.cpu().train()
    generator, loss = np.random.default_rng(seed), ErrorLoss()
    sizes = np.array([example.errors[0].numel() for example in examples])
    shares = sizes / sizes.sum()
    weights = [weight for weight in mapper.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 3e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, iterations, pct_start=0.1)
    means = [weight.detach().clone() for weight in weights]
    for i in range(iterations):
        energies, errors = map(torch.stack, zip(*(drawn(examples, shares, generator) for _ in range(batch))))
        predicted, total = mapper.errors_of(energies), 0
        for cells in CELLS:
            area = np.s_[:, :, generator.integers(cells):, generator.integers(cells):]
            total = total + loss(*(F.avg_pool2d(values[area], cells) for values in (predicted, errors)))
        optimizer.zero_grad()
        (total / len(CELLS)).backward()
        nn.utils.clip_grad_norm_(weights, 5)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for mean, weight in zip(means, weights):
                mean.lerp_(weight, 1 - min(0.99, (1 + i) / (10 + i)))
    with torch.no_grad():
        for mean, weight in zip(means, weights):
            weight.copy_(mean)
    mapper.to(device).eval()


class Routed(NamedTuple):
    """A routed network and what is to be expected of it.

    Attributes:
        net: The network, in evaluation mode.
        block: Its option block.
        photographs: How many were learnt from.
        held_back: How many were not, by which the rest is known; 0 where there were too few: it is of all then.
        psnr: PSNR of each branch on those, in dB, of all pixels together.
        shares: Share of each branch in their cells.
        cost: Time of that, of the hardest branch's, without router and overlap.
        loss: dB that routing costs, against the hardest branch.
    """
    net: nn.Module
    block: dict[str, Any]
    photographs: int
    held_back: int
    psnr: list[float]
    shares: list[float]
    cost: float
    loss: float


def joined(blocks: Sequence[Mapping[str, Any]], nets: Sequence[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """A CDNSR of trained networks, and its option block; its ErrorMap is new.

    Args:
        blocks: Option block of each branch, the hardest last.
        nets: The networks.

    Raises:
        ValueError: They differ in scale or channels.
    """
    scale, channels, _ = common_geometry(nets)
    classifier = dict(type='ErrorMap', num_in_ch=channels, num_classes=len(nets))
    block = dict(type='CDNSR', branches=copy.deepcopy(list(blocks)), classifier=classifier, upscale=scale)
    net = build_network(copy.deepcopy(block))
    for branch, trained in zip(net.branches, nets):
        branch.load_state_dict(trained.state_dict())
    return net.eval(), block


@torch.no_grad()
def routed_errors(mapper: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted and true errors of what gets a class of its own, of shape (M, n), and how many cells each has."""
    found = []
    for energies, errors in examples:
        predicted = mapper.errors_of(energies[:1].to(mapper.costs.device))[0].cpu()
        sizes = F.avg_pool2d(torch.ones_like(errors[:1]), ROUTED, ceil_mode=True, divisor_override=1)
        sums = [F.avg_pool2d(e, ROUTED, ceil_mode=True, divisor_override=1) / sizes for e in (predicted, errors)]
        found.append((*(e.flatten(1) for e in sums), sizes.flatten()))
    predicted, errors, sizes = (torch.cat(parts, dim=-1).double() for parts in zip(*found))
    return predicted, errors, sizes


def chosen(predicted: torch.Tensor, price: float, costs: torch.Tensor) -> torch.Tensor:
    """Class of least error and price, of shape (n, )."""
    return (predicted + price * costs[:, None]).argmin(dim=0)


def decibels(error: float, other: float) -> float:
    """How much worse an error is than another one, in dB."""
    return 10 * math.log10(max(error, 1e-9) / max(other, 1e-9))


def total_of(errors: torch.Tensor, sizes: torch.Tensor, classes: torch.Tensor) -> float:
    """Error of all, each in its class."""
    return float((errors.gather(0, classes[None])[0] * sizes).sum())


def margin_of(predicted: torch.Tensor, errors: torch.Tensor, sizes: torch.Tensor, costs: torch.Tensor,
              price: float) -> float:
    """True loss of PSNR by routing at a price, relative to the predicted one."""
    classes = chosen(predicted, price, costs)
    true, expected = (decibels(total_of(e, sizes, classes), float((e[-1] * sizes).sum())) for e in (errors, predicted))
    return min(max(true / max(expected, 1e-4), 1 / MOST_MARGIN), MOST_MARGIN)


def price_for(predicted: torch.Tensor, sizes: torch.Tensor, costs: torch.Tensor, max_loss: float) -> float:
    """The highest price at which routing is predicted to cost at most so many dB, against the hardest branch.

    Args:
        predicted: of shape (M, n), squared errors, the hardest branch's last.
        sizes: of shape (n, ), weight of each.
        costs: of shape (M, ), relative to the dearest.
        max_loss: dB, of all together.
    """

    def fits(price: float) -> bool:
        spent = total_of(predicted, sizes, chosen(predicted, price, costs))
        return decibels(spent, float((predicted[-1] * sizes).sum())) <= max_loss

    return turning_price(fits, 1e-3, 255.**2)[0]  # more no error is


def route(blocks: Sequence[Mapping[str, Any]],
          nets: Sequence[nn.Module],
          folder: str,
          max_loss: float = MAX_LOSS,
          limit: Optional[int] = None,
          device: Optional[torch.device] = None,
          left_out: Optional[list[tuple[str, str]]] = None,
          **kwargs: Any) -> Routed:
    """Makes a routed network of trained ones.

    Args:
        blocks, nets: See `joined`.
        folder: Photographs, or a folder with gt/ and lq/; see read_pairs.
        max_loss: dB that routing may cost, predicted on all photographs together; it gives the network's price.
        limit: Most photographs.
        device: Where the networks run. Default: the CPU.
        left_out: See read_pairs.
        kwargs: Of TileUpscaler, such as the precision.

    Raises:
        OptionError: The photographs cannot be used.
        ValueError: The networks do not go together.
    """
    net, block = joined(blocks, nets)
    net.to(device or 'cpu')
    engine = TileUpscaler(net, default_patch_size(net), cost='latency', **kwargs)
    pairs = read_pairs(folder, block['upscale'], limit, left_out)
    examples = examples_of(net, tqdm(pairs, desc='photographs', unit='', disable=None), **kwargs)
    if not examples:
        least = SIDE * 8 * block['upscale']
        raise OptionError(folder, f'holds no photograph of at least {least} pixels on each side to learn from')
    held_back = examples[HELD_BACK - 1::HELD_BACK]
    learnt = [example for i, example in enumerate(examples) if i % HELD_BACK != HELD_BACK - 1]
    mapper: Any = net.classifier
    train_router(mapper, learnt)
    costs = engine.costs.double()
    predicted, _, sizes = routed_errors(mapper, examples)
    known = routed_errors(mapper, held_back or examples)
    if held_back:
        mapper.margin = margin_of(*known, costs, price_for(predicted, sizes, costs, max_loss))
    mapper.price = price_for(predicted, sizes, costs, max_loss / mapper.margin)
    mapper.costs.copy_(costs)
    block['classifier'].update(price=mapper.price, margin=mapper.margin)
    predicted, errors, sizes = known
    classes = chosen(predicted, mapper.price, costs)
    alone = (errors * sizes).sum(dim=1)
    spent = total_of(errors, sizes, classes)
    shares = torch.bincount(classes, sizes, len(nets)) / sizes.sum()
    psnr = [decibels(255**2, float(error / sizes.sum())) for error in alone]
    return Routed(net, block, len(learnt), len(held_back), psnr, shares.tolist(),
                  float((shares * costs).sum() / costs[-1]), decibels(spent, float(alone[-1])))
