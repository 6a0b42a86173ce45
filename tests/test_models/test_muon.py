"""Muon: steps with equal singular values for matrices, AdamW's for all other weights."""
import copy
import pytest
import torch
from torch import nn

from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from cdnsr_basicsr.models import FastSRModel
from cdnsr_basicsr.models.muon import Muon, orthogonalized
from cdnsr_basicsr.options import OptionError
from cdnsr_basicsr.options.checks import check_optimizer
from tests.helpers import batch, carn


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 8, 20), (2, 20, 8)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    # matrices with singular values of 1 to 3: Newton-Schulz needs more iterations for much smaller ones
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrices = left @ torch.diag_embed(torch.linspace(1, 3, left.shape[-1]).expand(shape[0], -1)) @ right
    made = left.mT @ orthogonalized(matrices) @ right.mT
    values = made.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.25
    assert (made - torch.diag_embed(values)).abs().max() < 1e-4


def test_no_gradient_makes_no_step():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 1))


def stepped(network, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.rand(2, 3, 9, 9, generator=generator)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in network.parameters()]


def by_hand(network, lr, steps=3):
    """Each matrix alone; AdamW for the others."""
    rest = torch.optim.AdamW([p for p in network.parameters() if p.ndim < 2 or p.shape[1] == 1],
                             lr,
                             betas=(0.9, 0.99),
                             weight_decay=0)
    momenta, generator = {}, torch.Generator().manual_seed(1)
    for _ in range(steps):
        network.zero_grad()
        network(torch.rand(2, 3, 9, 9, generator=generator)).square().mean().backward()
        rest.step()
        for param in network.parameters():
            if param.ndim < 2 or param.shape[1] == 1:
                continue
            momentum = 0.95 * momenta.get(param, 0) + 0.05 * param.grad
            momenta[param] = momentum
            ahead = (0.05 * param.grad + 0.95 * momentum).flatten(1)
            step = orthogonalized(ahead[None])[0] * 0.2 * max(ahead.shape)**0.5
            param.data -= lr * step.view_as(param)
    return [param.detach().clone() for param in network.parameters()]


def test_matrices_of_a_shape_together_step_as_each_alone():
    network, other = net(), net()
    made = stepped(network, Muon(network.parameters(), lr=1e-2))
    for param, wanted in zip(made, by_hand(other, 1e-2)):
        torch.testing.assert_close(param, wanted, rtol=1e-4, atol=1e-6)


def test_the_step_has_the_size_that_its_learning_rate_says():
    for shape in ((8, 3, 3, 3), (8, 40), (40, 8)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1e-2).step()
        # singular values are about 1, not 1
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_weights_decay_by_themselves():
    network, other = net(), net()
    plain = stepped(network, Muon(network.parameters(), lr=1e-2), steps=1)
    start = [param.detach().clone() for param in other.parameters()]
    decayed = stepped(other, Muon(other.parameters(), lr=1e-2, weight_decay=0.1), steps=1)
    for with_decay, without, before in zip(decayed, plain, start):
        torch.testing.assert_close(with_decay, without - 1e-3 * before, rtol=0, atol=1e-6)


def test_it_goes_on_from_its_state():
    network = net()
    optimizer = Muon(network.parameters(), lr=1e-2)
    stepped(network, optimizer)
    copied = copy.deepcopy(network)
    again = Muon(copied.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(stepped(network, optimizer), stepped(copied, again)):
        assert torch.equal(one, other)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_an_option_file_may_choose_it(opt, precision):
    opt.update(model_type='FastSRModel', network_g=carn())
    del opt['tile']
    opt['train'] = {key: opt['train'][key] for key in ('total_iter', 'scheduler', 'pixel_opt')}
    opt['train'].update(optim_g=dict(type='Muon', lr=1e-3, betas=[0.9, 0.99], momentum=0.9), precision=precision)
    model = build_model(opt)
    assert isinstance(model.optimizer_g, Muon) and model.optimizer_g.momentum == 0.9
    losses = []
    for i in range(1, 31):
        model.feed_data(batch())
        model.optimize_parameters(i)
        losses.append(model.get_current_log()['l_pix'])
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize('wrong, said', [(dict(nesterov=True), 'nesterov'), (dict(momentum=1), 'momentum'),
                                         (dict(betas=[0.9, 1]), 'betas'), (dict(amsgrad=True), 'amsgrad')])
def test_wrong_arguments_are_refused_by_name(wrong, said):
    with pytest.raises(OptionError, match=said):
        check_optimizer(FastSRModel, dict(type='Muon', lr=1e-3, **wrong), 'train.optim_g')


def test_basicsr_itself_does_not_have_it():
    with pytest.raises(OptionError, match='accepted: Adam; got'):
        check_optimizer(SRModel, dict(type='Muon', lr=1e-3), 'train.optim_g')
