import numpy as np
import pytest
import torch
import yaml

from basicsr.archs import build_network
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.cli import main
from cdnsr_basicsr.data.label import by_thresholds, cheapest_within, equal_parts, label, patch_psnr
from cdnsr_basicsr.data.labels import Label, read_labels, write_labels
from cdnsr_basicsr.options import OptionError
from tests.helpers import decode, read_lmdb


@pytest.fixture
def checkpoint(tmp_path, tiny_net):
    net = build_network(tiny_net())
    path = tmp_path / 'cdnsr.pth'
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(), 'scale': 4}, str(path))
    return path, net.eval()


def test_equal_parts():
    assert equal_parts([5, 1, 3, 2, 4, 6], 3) == [0, 2, 1, 2, 1, 0]
    assert equal_parts([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert equal_parts([float('inf'), 2, 1], 3) == [0, 1, 2]


def test_thresholds():
    assert by_thresholds([40, 35.1, 30, 27.2, 20], [27.2, 35.1]) == [0, 0, 1, 1, 2]


def test_cheapest_within_margin():
    errors = np.array([[1.04, 1.0, 1.0], [1.06, 1.05, 1.0], [3., 2., 1.], [0., 0., 0.]])
    assert cheapest_within(errors, 0.05).tolist() == [0, 1, 2, 0]
    assert cheapest_within(errors, 0).tolist() == [1, 2, 2, 0]


def test_patch_psnr_equals_basicsr():
    from basicsr.metrics import calculate_psnr
    gt, output = torch.rand(3, 3, 24, 24).mul(255).round().div(255), torch.rand(3, 3, 24, 24)
    for i in range(3):
        images = [image[i].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy() for image in (output, gt)]
        assert patch_psnr(output, gt, 4)[i].item() == pytest.approx(calculate_psnr(*images, 4), abs=1e-6)
    assert patch_psnr(gt, gt, 4).tolist() == [float('inf')] * 3


@pytest.mark.slow
def test_bicubic_needs_no_network_and_orders_by_difficulty(dataset):
    path, counts = label(str(dataset), 'bicubic', num_classes=2)
    labels = read_labels(path)
    assert counts == [len(labels) // 2] * 2
    assert min(entry.score for entry in labels.values()
               if entry.label == 0) >= max(entry.score for entry in labels.values() if entry.label == 1)
    flat = [entry.label for key, entry in labels.items() if int(key[-5:]) < 64]
    assert flat.count(0) > len(flat) / 2


@pytest.mark.slow
def test_psnr_labels_by_the_network_given(dataset, checkpoint):
    path, net = checkpoint
    written, counts = label(str(dataset), 'psnr', str(path), thresholds=[5., 9.])
    lq, gt = (read_lmdb(dataset / name) for name in ('lq.lmdb', 'gt.lmdb'))
    assert sum(counts) == len(lq)
    for key, entry in read_labels(written).items():
        tensors = [
            torch.from_numpy(decode(data[key])[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for data in (lq, gt)
        ]
        with torch.no_grad():
            score = patch_psnr(net(tensors[0]), tensors[1], 4).item()
        assert entry.score == pytest.approx(score, abs=1e-3)
        assert entry.label == (score < 5) + (score < 9)


@pytest.mark.slow
def test_branches_labels_are_the_cheapest_good_branch(dataset, checkpoint):
    path, net = checkpoint
    written, counts = label(str(dataset), 'branches', str(path), margin=0.1)
    lq, gt = (read_lmdb(dataset / name) for name in ('lq.lmdb', 'gt.lmdb'))
    for key, entry in read_labels(written).items():
        tensors = [
            torch.from_numpy(decode(data[key])[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for data in (lq, gt)
        ]
        with torch.no_grad():
            errors = [255 * (branch(tensors[0]) - tensors[1]).abs().mean().item() for branch in net.branches]
        assert errors[entry.label] <= 1.1 * min(errors) + 1e-3
        assert all(error > 1.1 * min(errors) - 1e-3 for error in errors[:entry.label])
        assert entry.score == pytest.approx(errors[entry.label], abs=1e-3)
        with torch.no_grad():
            squares = [(255 * (branch(tensors[0]).clamp(0, 1) - tensors[1])).square().mean() for branch in net.branches]
        assert entry.errors == pytest.approx([square.item() for square in squares], rel=1e-3)


@pytest.mark.slow
def test_branches_can_be_those_that_an_option_file_names(dataset, checkpoint, tmp_path, tiny_net):
    path, net = checkpoint
    written, _ = label(str(dataset), 'branches', str(path))
    expected = written.read_text()
    paths = [str(tmp_path / f'{i}.pth') for i in range(3)]
    for branch, name in zip(net.branches, paths):
        torch.save({'params': branch.state_dict()}, name)
    opt = {'network_g': tiny_net(), 'path': {'pretrain_network_branches': paths}}
    (tmp_path / 'train.yml').write_text(yaml.safe_dump(opt))
    written, _ = label(str(dataset), 'branches', opt_path=str(tmp_path / 'train.yml'), overwrite=True)
    assert written.read_text() == expected
    opt['path']['pretrain_network_branches'] = paths[:2]
    (tmp_path / 'train.yml').write_text(yaml.safe_dump(opt))
    with pytest.raises(OptionError, match='does not name a checkpoint for each of network_g.branches'):
        label(str(dataset), 'branches', opt_path=str(tmp_path / 'train.yml'), overwrite=True)
    assert written.read_text() == expected


@pytest.mark.slow
@pytest.mark.parametrize('by', ['psnr', 'branches', 'bicubic'])
def test_same_labels_on_any_number_of_workers(dataset, checkpoint, by):
    texts = []
    for workers in (1, 4):
        model = None if by == 'bicubic' else str(checkpoint[0])
        path, _ = label(str(dataset), by, model, workers=workers, overwrite=True)
        texts.append(path.read_text())
    assert texts[0] == texts[1] and texts[0]


def test_label_file_round_trip(tmp_path):
    labels = {'b': Label(2, 31.5), 'a': Label(0, float('inf'))}
    write_labels(tmp_path / 'labels_x.txt', labels)
    assert (tmp_path / 'labels_x.txt').read_text() == 'a 0 inf\nb 2 31.500000\n'
    assert read_labels(tmp_path / 'labels_x.txt') == labels
    labels = {'a': Label(0, 1.5, (2.25, 1.)), 'b': Label(1, 2., (0.5, 0.25))}
    write_labels(tmp_path / 'labels_x.txt', labels)
    assert (tmp_path / 'labels_x.txt').read_text().splitlines()[0] == 'a 0 1.500000 2.250000 1.000000'
    assert read_labels(tmp_path / 'labels_x.txt') == labels


@pytest.mark.parametrize('text,message', [('a 0 1.0\nb zero 1.0\n', 'line 2'), ('a 0\n', 'line 1'),
                                          ('a -1 2.0\n', 'line 1'), ('a 0 1.0 2.0 x\n', 'line 1'),
                                          ('a 0 1.0 2.0\nb 0 1.0\n', 'line 2: has 0 errors')])
def test_broken_label_file_names_the_line(tmp_path, text, message):
    (tmp_path / 'labels.txt').write_text(text)
    with pytest.raises(OptionError, match=message):
        read_labels(tmp_path / 'labels.txt')


@pytest.mark.slow
def test_mistakes_are_one_line(dataset, checkpoint, tmp_path, capsys):
    stock = tmp_path / 'stock.pth'
    torch.save({'params': {}}, stock)
    (tmp_path / 'broken.pth').write_bytes(b'PK broken')
    cases = [
        (['-d', str(tmp_path / 'none'), '--by', 'bicubic'], 'contains no lq.lmdb'),
        (['-d', str(dataset), '--by', 'psnr'], 'needs a network: -m MODEL'),
        (['-d', str(dataset), '--by', 'psnr', '-m', 'none.pth'], 'none.pth: no such checkpoint file'),
        (['-d', str(dataset), '--by', 'psnr', '-m',
          str(tmp_path / 'broken.pth')], 'not a readable checkpoint'),
        (['-d', str(dataset), '--by', 'psnr', '-m', str(stock)], 'is of no known family'),
        (['-d', str(dataset), '--by', 'bicubic', '--classes', '9'], '--classes 9: expected 2 to 5'),
        (['-d', str(dataset), '--by', 'bicubic', '-m', str(stock)], '--by bicubic: needs no network'),
        (['-d', str(dataset), '--by', 'bicubic', '--margin',
          '0.1'], '--margin 0.1: expected a finite number of at least 0, and --by branches'),
        (['-d', str(dataset), '--by', 'branches', '-m',
          str(checkpoint[0]), '--margin', 'nan'], '--margin nan: expected a finite'),
        (['-d', str(dataset), '--by', 'branches', '-m',
          str(checkpoint[0]), '--classes', '3'], '--classes 3: cannot be combined with --by branches'),
        (['-d', str(dataset), '--by', 'bicubic', '--thresholds', '30', '--classes',
          '2'], '--classes 2: cannot be combined with --by branches'),
        (['-d', str(dataset), '--by', 'bicubic', '--teacher'], '--teacher: requires --by psnr'),
        (['-d', str(dataset), '--by', 'bicubic', '--thresholds',
          'nan'], '--thresholds: expected 1 to 4 finite numbers'),
    ]
    for arguments, message in cases:
        assert main(['label', *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('basicsr: error: ') and message in error
    assert main(['label', '-d', str(dataset), '--by', 'bicubic']) == 0
    assert main(['label', '-d', str(dataset), '--by', 'bicubic']) == 2
    assert '--overwrite replaces it' in capsys.readouterr().err


@pytest.mark.parametrize('name,value,message', [
    ('num_classes', 9, 'num_classes=9: expected 2 to 5'),
    ('margin', -1, 'margin=-1: expected a finite number'),
    ('thresholds', [float('nan')], 'thresholds: expected 1 to 4 finite numbers'),
    ('model', None, 'a checkpoint is needed'),
])
def test_wrong_arguments_of_the_function_are_named(dataset, checkpoint, name, value, message):
    with pytest.raises(OptionError, match=message):
        label(str(dataset), 'branches', **{'model': str(checkpoint[0]), name: value})
    assert not (dataset / 'labels_branches.txt').exists()


def test_values_that_are_not_finite_are_no_labels(dataset, tmp_path):
    block = dict(type='FSRCNN', upscale=4)
    net = build_network(block)
    net.deconv.bias.data.fill_(3e38)
    net.deconv.weight.data.fill_(3e38)
    save_checkpoint({'params': net.state_dict(), 'network_g': block, 'scale': 4}, str(tmp_path / 'huge.pth'))
    with pytest.raises(OptionError, match='huge.pth: computes values that are not finite for the patches of'):
        label(str(dataset), 'psnr', str(tmp_path / 'huge.pth'))
    assert not (dataset / 'labels_psnr.txt').exists()


@pytest.mark.slow
def test_network_of_another_scale_is_refused(dataset, tmp_path, tiny_net):
    net = build_network(tiny_net(2))
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(2), 'scale': 2}, str(tmp_path / 'x2.pth'))
    with pytest.raises(OptionError, match=r'the patches of .* are x4'):
        label(str(dataset), 'psnr', str(tmp_path / 'x2.pth'))
