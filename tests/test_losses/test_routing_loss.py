import math
import pytest
import torch

from basicsr.losses import build_loss
from basicsr.losses.basic_loss import charbonnier_loss
from cdnsr_basicsr.losses import AverageLoss, ClassLoss, ErrorLoss, FLOPsLoss, LabelLoss, squared_error
from cdnsr_basicsr.losses.routing_loss import average_loss, class_loss, flops_loss


@pytest.mark.parametrize('num_classes', [2, 3, 4, 5])
def test_class_loss_at_the_ends(num_classes):
    assert class_loss(torch.eye(num_classes)).item() == pytest.approx(0)
    uniform = torch.full((6, num_classes), 1 / num_classes)
    assert class_loss(uniform).item() == pytest.approx(num_classes - 1)


@pytest.mark.parametrize('num_classes', [2, 3, 4, 5])
def test_average_loss_at_the_ends(num_classes):
    assert average_loss(torch.eye(num_classes).repeat(3, 1)).item() == pytest.approx(0)
    assert average_loss(torch.eye(num_classes)[[1] * 7]).item() == pytest.approx(1)


def test_flops_loss_at_the_ends():
    costs = torch.tensor([0.3, 0.6, 1.0])
    hard, easy = torch.eye(3)[[2] * 4], torch.eye(3)[[0] * 4]
    assert flops_loss(easy, costs, 0.5).item() == 0
    assert flops_loss(hard, costs, 0.5).item() == pytest.approx(0.5 / 0.7)
    assert flops_loss(hard, costs, 1).item() == 0
    assert flops_loss(torch.eye(3)[[1] * 4], costs, 0.5).item() == pytest.approx(0.1 / 0.7)


def test_class_loss_equals_slow_loop():
    weights = torch.rand(9, 4).softmax(1)
    total = sum((3 - sum(abs(row[i] - row[j]) for i in range(4) for j in range(i + 1, 4))) for row in weights) / 9
    torch.testing.assert_close(class_loss(weights), total)


@pytest.mark.parametrize(
    'loss',
    [ClassLoss(2.), AverageLoss(2.), lambda w: FLOPsLoss(0.1, 2.)(w, torch.tensor([0.2, 0.5, 0.7, 1.]))])
def test_gradient_descent_lowers_the_loss(loss):
    logits = torch.randn(16, 4, requires_grad=True)
    value = loss(logits.softmax(1))
    gradient, = torch.autograd.grad(value, logits)
    assert gradient.abs().sum() > 0
    assert loss((logits - 0.5 * gradient).softmax(1)) < value


def test_loss_weight_scales():
    weights = torch.rand(5, 3).softmax(1)
    assert ClassLoss(3.)(weights) == pytest.approx(3 * class_loss(weights).item())
    assert AverageLoss(3.)(weights) == pytest.approx(3 * average_loss(weights).item())


def test_losses_equal_golden(shared):
    golden = torch.load(shared('golden/losses.pth'), weights_only=True)['routing']
    for row in golden:
        costs = torch.tensor(row['flops'])
        relative = costs / costs.max()
        torch.testing.assert_close(class_loss(row['probs']), row['class_loss'], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(average_loss(row['probs']), row['average_loss'], atol=1e-5, rtol=1e-5)
        # the published code divides by the range in GFLOPs: its value is ours / c_max
        ours = flops_loss(row['probs'], relative, row['target_flops']) / costs.max()
        torch.testing.assert_close(ours, row['flops_loss'], atol=1e-5, rtol=1e-5)
        # BasicSR's Charbonnier loss is the published one
        pixel = charbonnier_loss(row['branch_outputs'][0], row['gt'], eps=1e-6, reduction='sum')
        torch.testing.assert_close(pixel, row['charbonnier_sum'], atol=0, rtol=1e-5)


def test_classsr_losses_equal_golden(shared):
    for row in torch.load(shared('golden/classsr_losses.pth'), weights_only=True)['rows']:
        torch.testing.assert_close(class_loss(row['probs']), row['class_loss'], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(average_loss(row['probs']), row['average_loss'], atol=1e-5, rtol=1e-5)


def test_flops_loss_refuses_a_wrong_target():
    with pytest.raises(ValueError, match=r'target in \[0, 1\], but got 1.5'):
        build_loss({'type': 'FLOPsLoss', 'target': 1.5})


def test_label_loss_is_cross_entropy_that_fades_out():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = -logits.log_softmax(1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(LabelLoss(2.)(logits, labels, 10**6), 2 * expected)
    fading = LabelLoss(2., num_iter=100)
    values = [fading(logits, labels, i).item() for i in (1, 51, 101, 500)]
    assert values == pytest.approx([2 * expected.item(), expected.item(), 0, 0])
    sure = 100. * torch.eye(3)[labels]
    assert LabelLoss()(sure, labels).item() == pytest.approx(0)
    with pytest.raises(ValueError, match='num_iter of at least 1, but got 0'):
        LabelLoss(num_iter=0)


def test_squared_error_equals_numpy():
    output, gt = torch.rand(3, 3, 5, 7) * 2 - 0.5, torch.rand(3, 3, 5, 7)
    for i, error in enumerate(squared_error(output.requires_grad_(), gt)):
        expected = ((output[i].detach().numpy().clip(0, 1) - gt[i].numpy()) * 255)**2
        assert error.item() == pytest.approx(expected.mean(), rel=1e-5) and not error.requires_grad


def test_error_loss_equals_slow_loop():
    predicted, errors = torch.rand(6, 4) + 0.5, torch.rand(6, 4) * 3
    total = 0
    for guess, truth in zip(predicted.tolist(), errors.tolist()):
        unit = guess[0] + 1 / 12  # what rounding to 8 bits leaves
        total += (truth[0] + 1 / 12) / unit + math.log(unit)
        for i in range(1, 4):
            gap = abs((truth[0] - truth[i]) - (guess[0] - guess[i])) / unit
            total += 7 * (gap**2 / (2 * 0.5) if gap < 0.5 else gap - 0.25) / 3
    loss = ErrorLoss(2., gain_weight=7)
    assert loss(predicted, errors).item() == pytest.approx(2 * total / 6, rel=1e-5)
    # maps: cells count as patches do
    maps = [values.T.reshape(1, 4, 2, 3) for values in (predicted, errors)]
    assert loss(*maps).item() == pytest.approx(2 * total / 6, rel=1e-5)


def test_squared_errors_of_cells_are_those_of_crops():
    output, gt = torch.rand(2, 3, 19, 24), torch.rand(2, 3, 19, 24)
    found = squared_error(output, gt, 8)
    assert found.shape == (2, 2, 3)
    for row in range(2):
        for column in range(3):
            area = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            torch.testing.assert_close(found[:, row, column], squared_error(output[area], gt[area]))


@pytest.mark.slow
def test_error_loss_is_least_at_the_mean():
    # of patches that look alike: the mean is what a budget has to reckon with, not the median
    errors = torch.tensor([[10., 9.], [20., 19.], [90., 80.]])
    predicted = torch.tensor([50., 49.], requires_grad=True)
    loss = ErrorLoss(beta=10.)
    optimizer = torch.optim.Adam([predicted], lr=0.5)
    for _ in range(2000):
        optimizer.zero_grad()
        loss(predicted.expand(3, 2), errors).backward()
        optimizer.step()
        optimizer.param_groups[0]['lr'] *= 0.997
    torch.testing.assert_close(predicted.detach(), errors.mean(0), rtol=1e-3, atol=0)


def test_error_loss_refuses_beta_zero():
    with pytest.raises(ValueError, match='beta above 0'):
        ErrorLoss(beta=0)
