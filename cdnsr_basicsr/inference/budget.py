"""Which class each tile gets, from the classifier's logits and what may be spent. Needs torch only."""
from __future__ import annotations

import torch
from torch.nn import functional as F
from typing import Callable


class RoutingPath:
    """All sensible routings of an image, from every tile in the cheapest class to every tile in the dearest.

    With a price lambda on cost, the class of tile t is argmax_i (log p_ti - lambda * c_i). While lambda falls from
    infinity to minus infinity, every tile climbs from class to dearer class along the upper hull of its points
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
            # of classes on one line the dearest is the hull's corner
            corner = torch.where((slopes == price) & (rise > 0), costs, -torch.inf).argmax(dim=1)
            arrived = price.squeeze(1) == -torch.inf
            climbs.append(torch.where(arrived, current, corner))
            prices.append(torch.where(arrived, -torch.inf, price.squeeze(1)))
        self.climbs = torch.stack(climbs)
        every = torch.cat(prices) if prices else log_p.new_zeros(0)
        order = every.argsort(descending=True, stable=True)
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
        low, high = 0, len(self)
        if cost(self.classes(high)) <= limit:
            return self.classes(high)
        while high - low > 1:
            middle = (low + high) // 2
            if cost(self.classes(middle)) <= limit:
                low = middle
            else:
                high = middle
        return self.classes(low)
