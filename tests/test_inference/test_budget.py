import pytest
import torch

from cdnsr_basicsr.inference.budget import RoutingPath

COSTS = torch.tensor([2., 5., 11.])


def total(classes, costs=COSTS):
    return float(costs[classes].sum())


def test_ends_are_all_easy_and_all_hard():
    path = RoutingPath(torch.randn(50, 3), COSTS)
    assert path.classes(0).tolist() == [0] * 50
    assert path.classes(len(path)).tolist() == [2] * 50
    assert path.within(0, total).tolist() == [0] * 50
    assert path.within(1e9, total).tolist() == [2] * 50


@pytest.mark.parametrize('alike', [False, True])
def test_a_budget_is_met_to_one_tile(alike):
    logits = torch.randn(1, 3).repeat(40, 1) if alike else torch.randn(40, 3)
    path = RoutingPath(logits, COSTS)
    for limit in range(80, 441, 7):
        classes = path.within(limit, total)
        assert total(classes) <= limit
        assert total(classes) == 440 or limit - total(classes) < 9  # the dearest step of one tile


def test_more_budget_never_gives_a_tile_less():
    logits = 3 * torch.randn(60, 4)
    costs = torch.tensor([1., 1.5, 4., 9.])

    def bumpy(classes):  # merging tiles makes costs that do not grow with every step
        return total(classes, costs) - 3 * (int(classes.sum()) % 3)

    for cost in (lambda classes: total(classes, costs), bumpy):
        previous = torch.zeros(60, dtype=torch.int64)
        for limit in torch.linspace(60, 541, 60).tolist():
            classes = RoutingPath(logits, costs).within(limit, cost)
            assert (classes >= previous).all()
            previous = classes
        assert (classes == 3).all()


@pytest.mark.parametrize('costs', [[1., 2., 4.], [1., 3.9, 4.], [4., 1., 2.]])
def test_steps_are_those_of_a_falling_price(costs):
    costs = torch.tensor(costs, dtype=torch.float64)
    logits = torch.randn(6, 3, dtype=torch.float64)
    log_p = logits.log_softmax(dim=1)
    path = RoutingPath(logits, costs)
    on_path = {tuple(path.classes(count).tolist()) for count in range(len(path) + 1)}
    for price in torch.linspace(-8, 8, 4001, dtype=torch.float64):
        assert tuple((log_p - price * costs).argmax(dim=1).tolist()) in on_path
    assert tuple(logits.argmax(dim=1).tolist()) in on_path  # price 0: the published rule


def test_neighbours_differ_in_one_tile():
    path = RoutingPath(torch.zeros(9, 3), COSTS)
    for count in range(len(path)):
        assert (path.classes(count) != path.classes(count + 1)).sum() == 1


@pytest.mark.parametrize('costs', [[3., 3., 3.], [3., 3., 5.], [0., 0., 1.]])
def test_equal_costs_take_the_most_probable(costs):
    logits = torch.randn(20, 3)
    path = RoutingPath(logits, torch.tensor(costs))
    cheap = [i for i, cost in enumerate(costs) if cost == min(costs)]
    assert path.classes(0).tolist() == [max(cheap, key=lambda i: logits[t, i]) for t in range(20)]


def test_no_tiles_and_one_branch():
    assert len(RoutingPath(torch.zeros(0, 3), COSTS)) == 0
    path = RoutingPath(torch.zeros(4, 1), torch.ones(1))
    assert path.within(0, total).tolist() == [0] * 4
