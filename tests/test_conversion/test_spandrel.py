"""Checkpoints of the community, by spandrel: alone, as branches and as teachers; and CDNSR in spandrel."""
import copy
import cv2
import importlib.util
import numpy as np
import pytest
import sys
import torch

from basicsr.archs import build_network
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from cdnsr_basicsr import cli, load
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.complexity import count_macs
from cdnsr_basicsr.conversion.convert import Converted, convert, load_network, save
from cdnsr_basicsr.inference import TileUpscaler, default_patch_size
from cdnsr_basicsr.inference.network import common_geometry
from cdnsr_basicsr.options import OptionError
from cdnsr_basicsr.routing import joined
from tests.helpers import fsrcnn, photograph

spandrel = pytest.importorskip('spandrel')  # from Python 3.10 on

PUBLISHED = {'DAT_light_x4': 'DAT', 'RealESRGAN_x4plus_half': 'ESRGAN', 'realesr-animevideov3': 'Compact'}


def compact(upscale=2):
    return SRVGGNetCompact(num_feat=8, num_conv=2, upscale=upscale).eval()


def write(net, path, wrapped=False):
    torch.save(dict(params_ema=net.state_dict()) if wrapped else net.state_dict(), path)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_weights_give_the_recorded_output_also_from_our_files(shared, tmp_path, name):
    golden = torch.load(shared('golden/modern.pth'), weights_only=True, map_location='cpu')[name]
    converted = convert(str(shared(f'weights/{name}.pth')))
    assert converted.family == 'spandrel' and converted.scale == 4
    assert converted.block == dict(type='Spandrel', architecture=PUBLISHED[name], upscale=4, num_in_ch=3)
    for path in ('x.pth', 'x.safetensors'):
        save(converted, str(tmp_path / path))
        loaded = convert(str(tmp_path / path))
        assert loaded.family == 'own' and loaded.block == converted.block
        with torch.no_grad():
            difference = (loaded.net(golden['input']) - golden['output']).abs().max()
        assert float(difference) < 1e-4 * float(golden['output'].abs().max())


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('half', [False, True])
def test_any_command_takes_the_published_file(here, capsys, wrapped, half):
    net = compact()
    write(copy.deepcopy(net).half() if half else net, 'light.pth', wrapped)
    assert isinstance(load_network('light.pth'), torch.nn.Module)
    image = photograph(41, 33)
    cv2.imwrite('photo.png', image[..., ::-1])
    assert cli.main(['upscale', '-m', 'light.pth', '-i', 'photo.png', '-o', 'out']) == 0
    result = cv2.imread('out/photo.png')[..., ::-1]
    with torch.no_grad():
        whole = net(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert result.shape == (82, 66, 3) and np.abs(result - 255 * whole).max() < 2
    assert 'is not found' not in capsys.readouterr().out  # of SRVGGNetCompact, which BasicSR has under another name


def test_names_that_basicsr_has_suffixed_make_no_noise(capsys):
    build_network(dict(type='SRVGGNetCompact', num_feat=4, num_conv=1))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (16, 31), (33, 18)])
def test_sides_are_padded_to_what_the_network_takes(here, size):
    write(RRDBNet(3, 3, scale=2, num_feat=8, num_block=1, num_grow_ch=32), 'x2.pth')  # unshuffles by 4
    net = load_network('x2.pth')
    assert net.known_geometry == (2, 3, 4) and common_geometry([net]) == (2, 3, 4)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        output = net(x)
    assert output.shape == (2, 3, 2 * size[0], 2 * size[1])
    height, width = (-(-side // 4) * 4 for side in size)
    inside = np.pad(x.numpy(),
                    ((0, 0), (0, 0), (0, min(height - size[0], size[0] - 1)), (0, min(width - size[1], size[1] - 1))),
                    'reflect')
    rest = ((0, 0), (0, 0), (0, height - inside.shape[2]), (0, width - inside.shape[3]))
    with torch.no_grad():
        expected = net.model(torch.from_numpy(np.pad(inside, rest, 'edge')))[..., :output.shape[2], :output.shape[3]]
    torch.testing.assert_close(output, expected)
    assert TileUpscaler(net, 30).patch_size == 32


def test_a_minimum_is_kept_to(shared):
    net = convert(str(shared('weights/DAT_light_x4.pth'))).net
    with torch.no_grad():
        assert net(torch.rand(1, 3, 3, 20)).shape == (1, 3, 12, 80)


def test_what_is_no_super_resolution_network_is_refused_by_name(here):
    from spandrel.architectures.DnCNN import DnCNN
    for net, words in ((RRDBNet(3, 3, scale=1, num_feat=8, num_block=1,
                                num_grow_ch=32), 'ESRGAN is a network for Restoration'),
                       (DnCNN(in_nc=3, out_nc=3, nc=8, nb=17, act_mode='R'), 'DnCNN is a network for Restoration'),
                       (RRDBNet(4, 4, scale=4, num_feat=8, num_block=1, num_grow_ch=32), 'makes 4 channels from 4')):
        with pytest.raises(OptionError, match=rf'other\.pth.*{words}'):
            convert(write(net, 'other.pth'))


def test_without_the_extra_a_line_names_it(here, monkeypatch, capsys):
    save(convert(write(compact(), 'light.pth')), 'own.pth')
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, 'spandrel', None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'spandrel' else find(name))
    for name in ('light.pth', 'own.pth'):
        assert cli.main(['upscale', '-m', name, '-i', '.', '-o', 'out']) == 2
        (line, ) = capsys.readouterr().err.strip().splitlines()
        assert line.count(name) == 1 and "pip install 'cdnsr-basicsr[spandrel]'" in line


@pytest.mark.parametrize('block, words', [
    (dict(architecture='Nothing'), "unknown architecture 'Nothing'; accepted: .*DAT"),
    (dict(architecture='DAT'), 'cannot build a DAT from these weights'),
    (dict(architecture='Compact', upscale=4), 'belong to a Compact of x2 and 3 channels, not x4 and 3'),
    (dict(architecture='Compact', num_in_ch=1, upscale=2), 'not x2 and 1'),
])
def test_a_description_that_does_not_fit_is_refused(here, block, words):
    weights = {f'model.{key}': value for key, value in compact().state_dict().items()}
    save_checkpoint(dict(params=weights, network_g=dict(block, type='Spandrel')), 'x.pth')
    with pytest.raises(OptionError, match=words):
        load_network('x.pth')


def test_it_is_empty_until_there_are_weights_of_either_naming():
    net = build_network(dict(type='Spandrel', architecture='Compact', upscale=2))
    assert not net.state_dict() and not list(net.parameters())
    with pytest.raises(RuntimeError, match='this Compact has no weights yet'):
        net(torch.rand(1, 3, 16, 16))
    net.eval().requires_grad_(False)
    source, x = compact(), torch.rand(1, 3, 16, 16)
    net.load_state_dict(source.state_dict())
    assert not net.model.training and not any(weight.requires_grad for weight in net.parameters())
    with torch.no_grad():
        assert torch.equal(net(x), source(x))
        for naming in ('', 'model.'):
            other = compact()
            net.load_state_dict({naming + key: value for key, value in other.state_dict().items()})
            assert torch.equal(net(x), other(x))


def test_precisions_that_it_does_not_support_are_not_used(shared, caplog):
    net = convert(str(shared('weights/DAT_light_x4.pth'))).net
    assert net.precisions == ('float32', 'bfloat16')
    assert TileUpscaler(net, precision='bfloat16').dtypes == [torch.bfloat16]
    assert TileUpscaler(net, precision='float16').dtypes == [torch.float32]
    assert 'DAT cannot run in float16; it runs in float32.' in caplog.text


def routed(path='routed.safetensors'):
    converted = convert(write(compact(), 'heavy.pth'))
    light = build_network(dict(fsrcnn(4, 2)))
    net, block = joined([fsrcnn(4, 2), converted.block], [light, converted.net])
    save(Converted(net, block, 'own', ()), path)
    return net


def test_as_a_branch_it_comes_out_of_the_file_as_it_went_in(here):
    for name in ('routed.safetensors', 'routed.pth'):
        net = routed(name)
        loaded = convert(name)
        assert loaded.block['branches'][1] == dict(type='Spandrel', architecture='Compact', upscale=2, num_in_ch=3)
        x = torch.rand(1, 3, 20, 24)
        with torch.no_grad():
            assert torch.equal(loaded.net.branches[1](x), net.branches[1](x))
    engine = TileUpscaler(loaded.net)
    assert engine.cost_kind == 'latency'  # the archs differ
    assert engine.branch_macs[1] == count_macs(compact(), engine.patch_size, engine.patch_size)
    assert load('routed.pth', patch_size=24).upscale(torch.rand(1, 3, 50, 30)).image.shape == (1, 3, 100, 60)


def test_spandrel_opens_routed_files_and_runs_them_as_the_engine_does(here):
    from cdnsr_basicsr.spandrel_support import CDNSR_SUPPORT
    registry = spandrel.MAIN_REGISTRY.copy()
    registry.add(CDNSR_SUPPORT)
    image = torch.rand(1, 3, 150, 90)
    for name in ('routed.safetensors', 'routed.pth'):
        routed(name)
        model = spandrel.ModelLoader(registry=registry).load_from_file(name)
        assert (model.architecture.id, model.scale, model.purpose) == ('CDNSR', 2, 'SR')
        assert model.tags == ['FSRCNN', 'Spandrel'] and model.tiling is spandrel.ModelTiling.INTERNAL
        upscaled = load(name).upscale(image).image
        torch.testing.assert_close(model(image), upscaled.clamp(0, 1))
    other = spandrel.ModelLoader(registry=registry).load_from_file(write(compact(), 'other.pth'))
    assert other.architecture.id == 'Compact'


@pytest.mark.parametrize('tensor', [
    torch.zeros(3), torch.tensor([123], dtype=torch.uint8), torch.tensor([91, 93], dtype=torch.uint8),
    torch.tensor([255, 254], dtype=torch.uint8)
])  # yapf: disable
def test_what_describes_no_cdnsr_is_not_taken_for_one(tensor):
    from cdnsr_basicsr.spandrel_support import CDNSR_SUPPORT
    assert not CDNSR_SUPPORT.detect({'network_g': tensor}) and not CDNSR_SUPPORT.detect({})


def test_a_description_among_the_weights_is_no_weight(here):
    net = routed()
    from safetensors.torch import load_file
    weights = load_file('routed.safetensors')
    assert set(weights) - set(net.state_dict()) == {'network_g'}
    build_network(convert('routed.safetensors').block)  # of parts that know their weights ...
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(weights)  # ... a program that knows nothing of it loads them strictly
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in net.state_dict().items())


def test_tiles_of_transformers_are_of_whole_windows(shared):
    heavy = convert(str(shared('weights/DAT_light_x4.pth')))
    light = build_network(fsrcnn(4))
    net, _ = joined([fsrcnn(4), heavy.block], [light, heavy.net])
    assert default_patch_size(net) == 64  # of 32; with 68 all would be padded to 96
    assert default_patch_size(joined([fsrcnn(4)] * 2, [light] * 2)[0]) == 68


@pytest.mark.slow
def test_route_benchmark_calibrate_and_export_take_it_too(here, capsys):
    pytest.importorskip('onnxruntime')
    write(compact(), 'heavy.pth')
    (here / 'photographs').mkdir()
    for seed in range(3):
        cv2.imwrite(f'photographs/{seed}.png', photograph(320, 300, seed=seed)[..., ::-1])
    routing = ['--with', 'bicubic', '-i', 'photographs', '--reference', 'gt', '-o', 'routed.pth']
    assert cli.main(['route', 'heavy.pth', *routing]) == 0
    assert '| heavy.pth, as BasicSR runs it |' in capsys.readouterr().out
    data = ['--data', 'photographs', '--limit', '1', '--no-ssim', '--repeat', '1']
    assert cli.main(['benchmark', '-m', 'routed.pth', '--singles', 'heavy.pth', *data]) == 0
    assert capsys.readouterr().out.count('| heavy |') + 1 > 1
    assert cli.main(['calibrate', '-m', 'routed.pth', '-i', 'photographs', '--limit', '1', '--budgets', '0.5']) == 0
    assert cli.main(['export', 'heavy.pth', '-o', 'exported']) == 0
    capsys.readouterr()
    cv2.imwrite('photo.png', photograph(60, 50)[..., ::-1])
    for model in ('heavy.pth', 'exported'):
        assert cli.main(['upscale', '-m', model, '-i', 'photo.png', '-o', f'out_{model}']) == 0
    images = [cv2.imread(f'out_{model}/photo.png').astype(int) for model in ('heavy.pth', 'exported')]
    assert np.abs(images[0] - images[1]).max() <= 1
