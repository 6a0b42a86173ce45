"""Trains the ErrorMap of a routed network to predict its branches' errors, and finds its price."""
from __future__ import annotations

import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from typing import Any, NamedTuple, Sequence

from .inference.budget import turning_price
from .inference.tile_upscaler import square_of
from .losses import ErrorLoss

SIDE = 16  # of a part in a training batch, in cells
CELLS = (1, 2, 4)  # sides of the squares whose mean error is learnt, in cells: tiles need means over cells
ROUTED = 4  # approximate side of a tile in cells, for finding a price
MOST_MARGIN = 3  # measured on few photographs, a larger one would be chance
LEAST_PRICE = 1e-3  # of squared errors
CONTRAST = 0.4  # contrast is multiplied by exp(-CONTRAST) to exp(CONTRAST / 2), errors by the square of that


class Goal(NamedTuple):
    """What a router predicts, and the limit that its price has to meet.

    Attributes:
        reference: What errors are measured against. 'hardest': the hardest branch's image; 'gt': the ground truth.
        decibels: For 'hardest' the least PSNR relative to that image, for 'gt' the largest loss of PSNR against the
            hardest branch.
    """
    reference: str
    decibels: float

    def most(self, hardest: float) -> float:
        """The largest mean squared error that meets the goal, given that of the hardest branch."""
        return square_of(self.decibels) if self.reference == 'hardest' else hardest * 10**(self.decibels / 10)

    def asked(self, margin: float) -> Goal:
        """The goal for predicted errors, if true errors are larger by a margin."""
        if self.reference == 'gt':
            return self._replace(decibels=self.decibels / margin)
        return self._replace(decibels=self.decibels + 10 * math.log10(margin))

    def around(self) -> list[Goal]:
        """The goal itself, and those to measure in addition."""
        if self.reference == 'gt':
            return [self._replace(decibels=factor * self.decibels) for factor in (0.5, 1, 2.5, 5)]
        return [self._replace(decibels=self.decibels + more) for more in (5, 0, -5)]

    def __str__(self) -> str:
        return f'{self.decibels:g} dB' + (' lost' if self.reference == 'gt' else '')


class Example(NamedTuple):
    """A part of a photograph as a router sees it.

    Attributes:
        energies: Energies of shape (2, C, h, w), of the part and of its transpose, transposed back.
        errors: Mean squared error of each branch in each cell, of shape (M, h, w), in grey levels.
        weight: Number of cells that each cell represents.
    """
    energies: torch.Tensor
    errors: torch.Tensor
    weight: float = 1.


def drawn(examples: Sequence[Example], shares: np.ndarray,
          generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies and errors of a random part, in a random one of eight orientations and with a random contrast."""
    energies, errors, _ = examples[generator.choice(len(examples), p=shares)]
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
    """Trains an ErrorMap on the CPU; its weights become a running mean over the training.

    Args:
        mapper: The ErrorMap.
        examples: Parts to learn from; each pixel that they represent is about equally likely to be drawn.
        iterations, batch: Number of iterations, and of parts in a batch.
        seed: Seed of the random parts.
    """
    if not examples:
        raise ValueError(f'expected photographs of at least {SIDE * mapper.cell} pixels on each side')
    device = next(mapper.parameters()).device
    mapper.cpu().train()
    generator, loss = np.random.default_rng(seed), ErrorLoss()
    sizes = np.array([example.errors[0].numel() * example.weight for example in examples])
    known = slice(None, -1 if mapper.reference == 'hardest' else None)  # its own error is zero
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
            total = total + loss(*(F.avg_pool2d(values[area], cells)[:, known] for values in (predicted, errors)))
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


@torch.no_grad()
def routed_errors(mapper: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted and true errors of n tiles, of shape (M, n), and the number of cells that each represents."""
    found = []
    for energies, errors, weight in examples:
        predicted = mapper.errors_of(energies[:1].to(mapper.costs.device))[0].cpu()
        sizes = F.avg_pool2d(torch.ones_like(errors[:1]), ROUTED, ceil_mode=True, divisor_override=1)
        sums = [F.avg_pool2d(e, ROUTED, ceil_mode=True, divisor_override=1) / sizes for e in (predicted, errors)]
        found.append((*(e.flatten(1) for e in sums), weight * sizes.flatten()))
    predicted, errors, sizes = (torch.cat(parts, dim=-1).double() for parts in zip(*found))
    return predicted, errors, sizes


def chosen(predicted: torch.Tensor, price: float, costs: torch.Tensor) -> torch.Tensor:
    """Class with the least error + price * cost, of shape (n, )."""
    return (predicted + price * costs[:, None]).argmin(dim=0)


def decibels(error: float, other: float) -> float:
    """Ratio of two errors in dB."""
    return 10 * math.log10(max(error, 1e-9) / max(other, 1e-9))


def total_of(errors: torch.Tensor, sizes: torch.Tensor, classes: torch.Tensor) -> float:
    """Sum of the errors of all tiles in their classes."""
    return float((errors.gather(0, classes[None])[0] * sizes).sum())


def margin_of(predicted: torch.Tensor, errors: torch.Tensor, sizes: torch.Tensor, costs: torch.Tensor, price: float,
              goal: Goal) -> float:
    """How much worse routing at a price is than predicted: its loss of PSNR, or its error relative to the hardest
    branch's image, divided by the predicted one."""
    classes = chosen(predicted, price, costs)
    true, expected = (total_of(e, sizes, classes) for e in (errors, predicted))
    if goal.reference == 'gt':
        true, expected = (decibels(total, float((e[-1] * sizes).sum()))
                          for total, e in ((true, errors), (expected, predicted)))
    # a fidelity is a minimum: a result that is better than predicted on a few photographs may be chance
    least = 1 / MOST_MARGIN if goal.reference == 'gt' else 1.
    return min(max(true / max(expected, 1e-4), least), MOST_MARGIN)


def price_for(predicted: torch.Tensor, sizes: torch.Tensor, costs: torch.Tensor, goal: Goal) -> float:
    """The highest price at which routing is predicted to meet a goal.

    Args:
        predicted: Squared errors of shape (M, n), the hardest branch last.
        sizes: Weights of the tiles, of shape (n, ).
        costs: Costs of shape (M, ), relative to the most expensive branch.
        goal: The goal, for all tiles together.
    """
    most = goal.most(float((predicted[-1] * sizes).sum() / sizes.sum())) * float(sizes.sum())

    def keeps(price: float) -> bool:
        return total_of(predicted, sizes, chosen(predicted, price, costs)) <= most

    return turning_price(keeps, LEAST_PRICE, 255.**2)[0]  # no error is larger
