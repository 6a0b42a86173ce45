"""Assigns a class to each tile, by the classifier's logits and a budget. Needs only torch."""
from __future__ import annotations

import torch
from torch.nn import functional as F
from typing import Callable


class RoutingPath:
    """All sensible routings of an image, from every tile in the cheapest class to every tile in the most expensive.

    With a price lambda on cost, the class of tile t is argmax_i (log p_ti - lambda * c_i). While lambda falls from
    infinity to minus infinity, every tile climbs from class to more expensive class along the upper hull of its points
    (c_i, log p_ti); at lambda = 0 it passes the published rule, the most probable class. The steps of all tiles, in the
    order of their prices, are the path. Neighbours on it differ in one tile, also where many tiles are alike, and
    farther along it no tile has a cheaper class.

    Args:
        logits: of shape (n, M).
        costs: of shape (M, ), cost of a tile in each class, in any unit, in any order.
    """

    def __init__(self, logits: torch.Tensor, costs: torch.Tensor) -> None:
        log_p = F.log_softmax(logits.detach().cpu().double(), dim=1)
        costs = costs.detach().cpu().double()
        cheapest = (costs == costs.min()).nonzero().squeeze(1)
        climbs = [cheapest[log_p[:, cheapest].argmax(dim=1)]]  # class of each tile after 0, 1, ... of its steps
        prices = []
        for _ in range(len(costs) - 1):
            current = climbs[-1]
            rise = costs - costs[current].unsqueeze(1)
            gain = log_p - log_p.gather(1, current.unsqueeze(1))
            slopes = torch.where(rise > 0, gain / rise, -torch.inf)
            price = slopes.max(dim=1, keepdim=True).values
            # of classes on one line the most expensive is the hull's corner
            corner = torch.where((slopes == price) & (rise > 0), costs, -torch.inf).argmax(dim=1)
            arrived = price.squeeze(1) == -torch.inf
            climbs.append(torch.where(arrived, current, corner))
            prices.append(torch.where(arrived, -torch.inf, price.squeeze(1)))
        self.climbs = torch.stack(climbs)
        every = torch.cat(prices) if prices else log_p.new_zeros(0)
        order = every.argsort(descending=True, stable=True)
        self.prices = every[order]
        self.tiles = (order % max(len(log_p), 1))[:int((every > -torch.inf).sum())]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.tiles)

    def classes(self, count: int) -> torch.Tensor:
        """Class of each tile after `count` steps, of shape (n, ), int64."""
        taken = torch.bincount(self.tiles[:count], minlength=self.climbs.shape[1])
        return self.climbs.gather(0, taken.unsqueeze(0)).squeeze(0)

    def within(self, limit: float, cost: Callable[[torch.Tensor], float]) -> torch.Tensor:
        """The classes of a routing that costs at most `limit`, while one step farther would cost more.

        Bisection. Also where `cost` does not grow with every step, a larger limit gives no tile a cheaper class.

        Args:
            limit: What may be spent. If the path's beginning costs more than that, it is the beginning.
            cost: Cost of a routing, given the classes.
        """
        return self.classes(last_within(limit, lambda count: cost(self.classes(count)), len(self)))


class SettledPath:
    """As RoutingPath, for cells of an image whose borders cost: where neighbours differ in class, each is run with some
    pixels of the other around it.

    With a price lambda on cost, the classes are those that none would change by itself to make
    sum(error + lambda * (cost + borders)) less. Prices fall from where the cheapest class is everywhere to zero, in
    steps; between two of them cells go over one by one.

    Args:
        errors: of shape (rows, columns, M), of each cell in each class.
        costs: of shape (M, ), cost of a cell in each class.
        border: Share of a cell's cost that each side costs where the neighbour is of another class.
    """

    STEPS = 32  # of prices

    def __init__(self, errors: torch.Tensor, costs: torch.Tensor, border: float) -> None:
        self.errors, self.costs, self.border = errors.detach().cpu().double(), costs.detach().cpu().double(), border
        prices = RoutingPath(-self.errors.flatten(0, 1), self.costs).prices
        prices = prices[prices > 0]
        wanted = torch.linspace(0, len(prices) - 1, min(self.STEPS, len(prices))).round().long()
        self.prices = [float('inf'), *prices[wanted].tolist(), 0.]

    def at(self, price: float) -> torch.Tensor:
        """Class of each cell at a price, of shape (rows, columns), int64."""
        if price == float('inf'):
            return self.costs.argmin().expand(self.errors.shape[:2])
        return settled(self.errors, price * self.costs, self.border)

    def within(self, limit: float, cost: Callable[[torch.Tensor], float]) -> torch.Tensor:
        """See RoutingPath.within."""
        known: dict[int, torch.Tensor] = {}

        def cost_at(step: int) -> float:
            known[step] = self.at(self.prices[step])
            return cost(known[step].flatten())

        step = last_within(limit, cost_at, len(self.prices) - 1)
        classes = self.at(self.prices[step]).flatten()
        if step == len(self.prices) - 1:
            return classes
        following = known[step + 1].flatten()
        changed = (classes != following).nonzero().flatten()

        def changed_until(count: int) -> torch.Tensor:
            return classes.index_copy(0, changed[:count], following[changed[:count]])

        return changed_until(last_within(limit, lambda count: cost(changed_until(count)), len(changed)))


def last_within(limit: float, cost: Callable[[int], float], last: int) -> int:
    """The number, up to `last`, whose cost is at most the limit, while that of the next is more; 0 if there is none.

    Bisection: of a cost that does not always grow, one of such numbers.
    """
    if cost(last) <= limit:
        return last
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def turning_price(holds: Callable[[float], bool], low: float, high: float, halvings: int = 24) -> tuple[float, float]:
    """Two prices close to each other, at the lower of which something holds, and at the higher one not.

    Args:
        holds: Of a price; up to some price it holds, above it does not.
        low, high: What the price lies between; one that never turns is taken to do so at an end.
        halvings: Of their ratio's logarithm.
    """
    for _ in range(halvings):
        middle = (low * high)**0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def settled(errors: torch.Tensor, costs: torch.Tensor, border: float, rounds: int = 8) -> torch.Tensor:
    """Classes of cells that none would change by itself, its neighbours being what they are.

    Of a chessboard's fields first the white ones change, then the black ones; they begin with the class that is best
    without borders. Iterated conditional modes: Besag, On the Statistical Analysis of Dirty Pictures (1986).

    Args:
        errors: of shape (rows, columns, M).
        costs: of shape (M, ), cost of a cell in each class, in units of the errors.
        border: Share of its cost that each side costs a cell whose neighbour there is of another class.
        rounds: Most changes of all fields.

    Returns:
        Classes of shape (rows, columns), int64.
    """
    alone = errors + costs
    classes = alone.argmin(dim=2)
    rows, columns, count = alone.shape
    if border == 0 or count == 1:
        return classes
    white = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
    # what a side costs a cell of class i beside one of class j: the strips on both sides of it
    sides = border * (costs[:, None] + costs) * (1 - torch.eye(count, dtype=costs.dtype))
    sides = torch.cat([sides, sides.new_zeros(1, count)])  # beyond the image nothing is
    for step in range(2 * rounds):
        around = F.pad(classes, (1, 1, 1, 1), value=count)
        total = alone + sides[around[:-2, 1:-1]] + sides[around[2:, 1:-1]] + sides[around[1:-1, :-2]] \
            + sides[around[1:-1, 2:]]
        changed = torch.where(white if step % 2 == 0 else ~white, total.argmin(dim=2), classes)
        if step and torch.equal(changed, classes) and step % 2:
            break
        classes = changed
    return classes
