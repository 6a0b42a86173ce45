"""Multiply-accumulates of networks that have a form for training and one for inference."""
from cdnsr_basicsr.archs import ETDS, SPAN
from cdnsr_basicsr.complexity import count_macs


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
