import itertools
import pytest
import torch

from cdnsr_basicsr.inference.budget import RoutingPath, SettledPath, settled

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


def energy(classes, errors, costs, border):
    """What settled makes small, one cell and one side after the other."""
    rows, columns, _ = errors.shape
    total = 0.
    for y, x in itertools.product(range(rows), range(columns)):
        kind = int(classes[y, x])
        total += float(errors[y, x, kind] + costs[kind])
        for near in ((y + 1, x), (y, x + 1)):
            if near[0] < rows and near[1] < columns and int(classes[near]) != kind:
                total += border * float(costs[kind] + costs[int(classes[near])])
    return total


@pytest.mark.parametrize('border', [0., 0.1, 0.5])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (6, 5)])
def test_no_cell_would_change_by_itself(size, border):
    errors, costs = torch.rand(*size, 3).double() * 20, COSTS.double()
    classes = settled(errors, costs, border, rounds=100)
    least = energy(classes, errors, costs, border)
    assert least <= energy((errors + costs).argmin(dim=2), errors, costs, border) + 1e-9
    for y, x, kind in itertools.product(range(size[0]), range(size[1]), range(3)):
        other = classes.clone()
        other[y, x] = kind
        assert energy(other, errors, costs, border) >= least - 1e-9


def test_borders_make_areas_of_one_class():
    errors, costs = torch.rand(30, 40, 3).double() * 20, COSTS.double()

    def sides(classes):
        return int((classes[1:] != classes[:-1]).sum() + (classes[:, 1:] != classes[:, :-1]).sum())

    found = [sides(settled(errors, costs, border)) for border in (0, 0.1, 0.3)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize('border', [0., 0.2])
def test_a_budget_is_met_to_one_cell_by_predicted_errors(border):
    errors = 10 * torch.rand(8, 9, 1) * torch.tensor([1., 0.7, 0.5]) + torch.rand(8, 9, 3)
    path = SettledPath(errors, COSTS, border)
    least = total(errors.flatten(0, 1).argmin(dim=1))
    assert total(path.within(1e9, total)) == least and total(path.within(0, total)) == 8 * 9 * 2
    for limit in range(8 * 9 * 2, int(least), 7):
        classes = path.within(limit, total)
        # of one cell the dearest step: from class 0 to 2 where the price jumped past class 1
        assert limit - 9 <= total(classes) <= limit


def test_without_borders_a_settled_path_is_the_path_of_prices():
    """And spends a budget where errors fall most: no other choice of classes at that cost has less of them."""
    errors = torch.rand(5, 6, 2) * torch.tensor([4., 1.])
    costs = torch.tensor([1., 3.])
    for limit in range(30, 91, 2):
        ours = SettledPath(errors, costs, 0.).within(limit, lambda classes: total(classes, costs))
        gains = (errors[..., 0] - errors[..., 1]).flatten().sort(descending=True).values
        most = gains[:(limit - 30) // 2].clamp(min=0).sum()
        saved = errors[..., 0].sum() - errors.flatten(0, 1).gather(1, ours[:, None]).sum()
        assert float(saved) == pytest.approx(float(most), abs=0.35)
