"""`basicsr convert`: what it writes upscales; what it cannot do it says in one line, and leaves nothing behind."""
import cv2
import numpy as np
import pytest
import torch
import yaml
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.conversion.convert import load_network
from tests.helpers import photograph, spread

ETDS = {'type': 'ETDS', 'num_feat': 12, 'num_block': 2, 'num_residual_feat': 4, 'upscale': 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(block, path, describe=True):
    """A random network, as a checkpoint."""
    torch.manual_seed(0)
    net = build_network(dict(block)).eval()
    for param in net.parameters():
        param.data += 0.05 * torch.randn_like(param)
    content = {'params': net.state_dict(), 'scale': block['upscale']}
    save_checkpoint(dict(content, network_g=block) if describe else content, path)
    return net


def routed_block():
    branches = [ETDS, {'type': 'FSRCNN', 'num_feat': 4, 'upscale': 2}, dict(ETDS, num_block=3)]
    return dict(type='CDNSR', upscale=2, branches=branches, classifier=dict(type='PatchClassifier', num_feat=8))


@pytest.mark.slow
def test_published_weights_upscale_a_picture(shared, folder, capsys):
    cv2.imwrite('in.png', photograph(21, 30, 0))
    assert cli.main(['convert', str(shared('weights/carn_m.pth')), '-o', 'carn_x2.safetensors', '--scale', '2']) == 0
    printed = capsys.readouterr().out
    assert 'CARN_M x2 (CARN-pytorch): num_in_ch 3' in printed and 'Wrote carn_x2.safetensors.' in printed
    assert cli.main(['upscale', '-m', 'carn_x2.safetensors', '-i', 'in.png', '-o', 'out']) == 0
    assert cv2.imread('out/in.png').shape == (42, 60, 3)


@pytest.mark.slow
def test_plain_branches_upscale_identically(folder, capsys):
    net = checkpoint(routed_block(), 'trained.pth')
    spread(net)
    save_checkpoint({'params': net.state_dict(), 'network_g': routed_block(), 'scale': 2}, 'trained.pth')
    assert cli.main(['convert', 'trained.pth', '-o', 'plain.pth', '--plain']) == 0
    assert 'branch 0: PlainConvSR' in capsys.readouterr().out
    plain = load_network('plain.pth')
    assert [type(branch).__name__ for branch in plain.branches] == ['PlainConvSR', 'FSRCNN', 'PlainConvSR']
    x = torch.rand(9, 3, 13, 17)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x), atol=1e-5, rtol=0)
    cv2.imwrite('in.png', photograph(70, 91, 0))
    for model in ('trained', 'plain'):
        assert cli.main(['upscale', '-m', f'{model}.pth', '-i', 'in.png', '-o', model, '--patch-size', '32']) == 0
    trained, plain = (cv2.imread(f'{model}/in.png').astype(np.int16) for model in ('trained', 'plain'))
    assert len(np.unique(trained)) > 50
    # the same but for sums in another order, which may fall to the other side of a rounding
    assert np.abs(trained - plain).max() <= 1 and (trained != plain).mean() < 1e-3


def test_one_network_made_plain_and_clipped(folder):
    net = checkpoint(ETDS, 'etds.pth')
    assert cli.main(['convert', 'etds.pth', '-o', 'plain.safetensors', '--plain', '--clip']) == 0
    x = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        torch.testing.assert_close(load_network('plain.safetensors')(x), net(x).clamp(0, 1), atol=1e-5, rtol=0)


def test_a_checkpoint_of_basicsr_described_by_an_option_file(folder):
    """BasicSR's ECBSR in its training form, as its SRModel saves it."""
    block = {'type': 'ECBSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': True}
    block.update(act_type='prelu', scale=2)
    torch.manual_seed(0)
    net = build_network(dict(block)).eval()
    torch.save({'params': net.state_dict()}, 'net_g.pth')
    Path('train.yml').write_text(yaml.safe_dump({'network_g': block}))
    assert cli.main(['convert', 'net_g.pth', '-opt', 'train.yml', '-o', 'plain.pth', '--plain']) == 0
    x = torch.rand(1, 3, 8, 11)
    with torch.no_grad():
        torch.testing.assert_close(load_network('plain.pth')(x), net(x), atol=1e-4, rtol=0)


def refused(capsys, *arguments):
    assert cli.main(['convert', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    return error


@pytest.mark.slow
def test_mistakes(folder, capsys):
    checkpoint(ETDS, 'etds.pth')
    checkpoint({'type': 'FSRCNN', 'num_feat': 4, 'upscale': 2}, 'fsrcnn.pth')
    checkpoint({'type': 'FSRCNN', 'num_feat': 4, 'upscale': 2}, 'bare.pth', describe=False)
    checkpoint(routed_block(), 'routed.pth')
    for arguments, message in [
        (['no.pth', '-o', 'x.pth'], 'no.pth: no such checkpoint file'),
        (['etds.pth', '-o', 'x.onnx'], '-o x.onnx: expected a name that ends in .pth or .safetensors'),
        (['etds.pth', '-o', 'no/x.pth'], 'no: no such folder'),
        (['etds.pth', '-o', 'fsrcnn.pth'], 'fsrcnn.pth: already exists; --overwrite replaces it'),
        (['etds.pth', '-o', 'x.pth', '--clip'], '--clip: requires --plain'),
        (['etds.pth', '-o', 'x.pth', '--from', 'esrgan'], '--from esrgan: accepted: auto, abpn, arm, carn'),
        (['etds.pth', '-o', 'x.pth', '--scale', '3'], 'already has a description'),
        (['fsrcnn.pth', '-o', 'x.pth', '--plain'], 'FSRCNN cannot be made plain; accepted: ETDS, ECBSR, PlainConvSR'),
        (['routed.pth', '-o', 'x.pth', '--plain', '--clip'], 'a branch must not clip: its tiles are blended first'),
        (['bare.pth', '-o', 'x.pth'], 'of no known family'),
        (['bare.pth', '-o', 'x.pth', '-opt', 'no.yml'], 'no.yml: '),
    ]:
        assert message in refused(capsys, *arguments)
    assert not list(folder.glob('*x.*'))
    before = Path('fsrcnn.pth').read_bytes()
    assert cli.main(['convert', 'etds.pth', '-o', 'fsrcnn.pth', '--overwrite']) == 0
    assert Path('fsrcnn.pth').read_bytes() != before
    assert cli.main(['convert', 'etds.pth', '-o', 'etds.pth', '--plain', '--overwrite']) == 0
    assert 'is already plain, or cannot be' in refused(capsys, 'etds.pth', '-o', 'x.pth', '--plain')


def test_nothing_is_written_when_a_plain_form_differs(folder, capsys, monkeypatch):
    from cdnsr_basicsr.conversion import plain
    checkpoint(ETDS, 'etds.pth')
    monkeypatch.setattr(plain, 'TOLERANCE', -1)
    assert 'ETDS and its plain form differ by' in refused(capsys, 'etds.pth', '-o', 'x.pth', '--plain')
    assert not list(folder.glob('*x.*'))
