"""Multiply-accumulates, also of networks that have a form for training or look at inputs; times by a fake clock."""
import pytest
import torch
from torch import nn

from cdnsr_basicsr import complexity
from cdnsr_basicsr.archs import ETDS, SPAN, SPANV2, SMFANet
from cdnsr_basicsr.complexity import count_macs, measure_latency


def test_multiply_accumulates_of_etds():
    net = ETDS(num_feat=12, num_block=2, upscale=2)
    per_pixel = 9 * (3 * 12 + 2 * (9 * 9 + 3 * 9 + 3 * 3) + 12 * 12)
    assert count_macs(net, 8, 8) == 64 * per_pixel
    net.switch_to_deploy()
    assert count_macs(net, 8, 8) == 64 * 9 * (3 * 12 + 2 * 12 * 12 + 12 * 12)


def test_operations_are_those_of_the_folded_convs():
    net = SPAN(num_feat=8, num_block=2)
    convs = 9 * (3 * 8 + 7 * 8 * 8 + 8 * 48) + 32 * 8  # the first, three a block and one after them, the last; conv_cat
    assert count_macs(net, 10, 12) == 120 * convs
    assert not net.deployed  # only a copy was folded
    net.switch_to_deploy()
    assert count_macs(net, 10, 12) == 120 * convs


class Asking(nn.Module):
    """A conv that asks what its input is before it runs."""

    def __init__(self, refuses):
        super().__init__()
        self.conv, self.refuses = nn.Conv2d(3, 4, 3, padding=1), refuses

    def forward(self, x):
        if self.refuses(x):
            raise ValueError('not such a tensor')
        return self.conv(x)


SIDE = 2**20  # no computer has the memory to compute an image of this size


def test_a_network_that_asks_for_a_device_is_not_computed():
    assert count_macs(Asking(lambda x: x.device.type != 'cpu'), SIDE, SIDE) == SIDE**2 * 9 * 3 * 4


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('arch', [SPAN, SPANV2, SMFANet])
def test_networks_with_autocast_or_attention_are_not_computed(arch, deployed):
    net = arch(num_feat=8, num_block=2)
    if deployed:
        net.apply(lambda part: part.switch_to_deploy() if hasattr(part, 'switch_to_deploy') else None)
    assert count_macs(net, SIDE, SIDE) == pytest.approx((SIDE // 64)**2 * count_macs(net, 64, 64), rel=0.01)


@pytest.mark.parametrize('refuses', [lambda x: type(x) is not torch.Tensor or x.is_meta, lambda x: x.sum() > 0])
def test_networks_that_ask_for_values_are_computed(refuses):
    assert count_macs(Asking(refuses), 10, 12) == 120 * 9 * 3 * 4


def test_what_a_network_says_when_computed_is_raised(caplog):
    with pytest.raises(RuntimeError, match='3 channels'):
        count_macs(nn.Conv2d(3, 4, 3), 8, 8, channels=1)
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        count_macs(nn.Linear(3, 4), 8, 8)
    assert not caplog.records


class Script:
    """A clock, and a part whose passes take the given seconds by it."""

    def __init__(self, *seconds):
        self.now, self.seconds = 0., list(seconds)

    def perf_counter(self):
        return self.now

    def __call__(self, x):
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(
    'seconds,expected,steady',
    [
        ([8., *[0.01] * 5], 0.01, True),  # the first pass loads libraries
        ([8., 0.6, 0.6], 0.6, True),
        ([20., 19.], 19., True),  # a slow part: once more, so that the loading is not counted
        ([0.1, 0.1, 0.11, 0.107, 0.108, 0.1], 0.107, True),  # a quiet minute
        ([0.1, 0.1, 0.1, 0.4, 0.1, 0.1], 0.1, True),
        ([0.1, 0.1, 0.2, 0.3, 0.2, 0.1, *[0.1] * 5], 0.1, True),  # disturbed once
        ([0.1, 0.1, 0.2, 0.2, 0.2, 0.2, *[0.2] * 5, *[0.1] * 5], 0.1, True),  # evenly slow is not quiet
        ([0.1, *[0.1, 0.2, 0.2, 0.2, 0.2], *[0.1, 0.16, 0.16, 0.16, 0.2], *[0.18] * 5], 0.16, False),
    ])
def test_time_is_that_of_warm_passes_and_is_relied_on_where_they_agree(monkeypatch, seconds, expected, steady):
    script = Script(*seconds)
    monkeypatch.setattr(complexity, 'time', script)
    assert measure_latency(script, torch.zeros(1)) == (pytest.approx(expected), steady)
    assert script.seconds == []
