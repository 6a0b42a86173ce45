import copy
import cv2
import logging
import numpy as np
import pytest
import struct
import torch
import zipfile
from collections import OrderedDict
from torch.utils.data import DataLoader

from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.train import load_resume_state
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.inference import TileUpscaler
from cdnsr_basicsr.models import CDNSRModel
from cdnsr_basicsr.models.cdnsr_options import LOSSES
from cdnsr_basicsr.options import OptionError
from tests.helpers import Images, carn, fsrcnn, make, spread, step, swinir


def test_a_step_moves_every_part_and_logs_every_loss(opt):
    model = make(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    moved = {
        key.split('.')[0]
        for key, value in model.net_g.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {'branches', 'classifier'}
    log = model.get_current_log()
    assert list(log) == [
        'l_pixel', 'l_class', 'l_average', 'l_flops', 'cost', 'entropy', 'share_0', 'share_1', 'share_2', 'tau', 'lr'
    ]
    assert all(np.isfinite(value) for value in log.values())
    assert sum(log[f'share_{i}'] for i in range(3)) == pytest.approx(1)
    assert model.costs[0] <= log['cost'] <= 1 and 0 <= log['entropy'] <= 1


def test_only_configured_losses_exist(opt):
    for name in ('class_opt', 'average_opt', 'flops_opt'):
        del opt['train'][name]
    model = make(opt)
    step(model)
    assert list(model.losses) == ['pixel']
    assert [key for key in model.get_current_log() if key.startswith('l_')] == ['l_pixel']


@pytest.mark.parametrize('name', ['class', 'average', 'flops'])
def test_every_loss_reaches_the_classifier(opt, name):
    opt['train']['pixel_opt'] = {'type': 'L1Loss', 'loss_weight': 0}
    opt['train'].update({key: None for key in ('class_opt', 'average_opt', 'flops_opt') if key != f'{name}_opt'})
    model = make(opt)
    step(model)
    assert all(param.grad.abs().sum() > 0 for key, param in model.net_g.classifier.named_parameters() if 'fc' in key)
    assert all(param.grad.abs().sum() == 0 for param in model.net_g.branches.parameters())


def test_tau_is_annealed(opt):
    model = make(opt)
    taus = []
    for current_iter in (1, 5, 10):
        step(model, current_iter)
        taus.append(model.net_g.tau)
    assert taus == pytest.approx([0.9, 0.5, 0.4])


@pytest.mark.parametrize('part,other', [('branches', 'classifier'), ('classifier', 'branches')])
def test_freeze(opt, part, other):
    opt['train']['freeze'] = [part]
    if part == 'classifier':
        opt['train'].update({f'{name}_opt': None for name in ('class', 'average', 'flops')})
    model = make(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    moved = {
        key.split('.')[0]
        for key, value in model.net_g.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {other}
    optimized = {id(param) for group in model.optimizer_g.param_groups for param in group['params']}
    assert optimized == {id(param) for param in getattr(model.net_g, other).parameters()}


def test_training_lowers_the_pixel_loss(opt):
    opt['train']['optim_g']['lr'] = 0.005
    model = make(opt)
    values = []
    for i in range(40):
        step(model)
        values.append(model.get_current_log()['l_pixel'])
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_branches_are_loaded_from_checkpoints_of_the_stock_model(opt, tmp_path):
    paths = []
    for i, block in enumerate(opt['network_g']['branches']):
        torch.manual_seed(100 + i)
        state, ema = (build_network(block).state_dict() for _ in range(2))
        paths.append(str(tmp_path / f'{i}.pth'))
        torch.save({'params': state, 'params_ema': ema} if i else {'params': state}, paths[-1])
    opt['path']['pretrain_network_branches'] = paths
    opt['train']['ema_decay'] = 0.9
    model = make(opt)
    for i, path in enumerate(paths):
        saved = torch.load(path, weights_only=True)
        saved = saved.get('params_ema', saved['params'])
        for net in (model.net_g, model.net_g_ema):
            assert all(torch.equal(value, saved[key]) for key, value in net.branches[i].state_dict().items())


@pytest.mark.slow
def test_checkpoint_describes_itself(opt, tmp_path):
    opt['network_g'] = OrderedDict(opt['network_g'])
    opt['train']['ema_decay'] = 0.5
    model = make(opt)
    step(model)
    model.save(0, 3)
    path = tmp_path / 'models' / 'net_g_3.pth'
    content = torch.load(path, weights_only=True)
    assert content['scale'] == 4 and content['network_g'] == dict(opt['network_g'])
    assert content.keys() == {'params', 'params_ema', 'network_g', 'scale'}
    net, x = load_network(str(path)), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model.net_g_ema(x))
    assert all(torch.equal(value, model.net_g_ema.state_dict()[key]) for key, value in net.state_dict().items())
    assert not list(tmp_path.rglob('.*')), 'temporary files are left'


def test_a_failed_save_keeps_the_file_before_it(opt, tmp_path, monkeypatch):
    model = make(opt)
    model.save(0, -1)
    before = (tmp_path / 'models' / 'net_g_latest.pth').read_bytes()

    def half(content, path):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(OSError, match='disk full'):
        model.save(0, -1)
    assert (tmp_path / 'models' / 'net_g_latest.pth').read_bytes() == before
    assert [path.name for path in (tmp_path / 'models').iterdir()] == ['net_g_latest.pth']


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted(opt, tmp_path):
    opt['network_g']['mixture'] = 'softmax'  # no random numbers
    opt['train']['ema_decay'] = 0.9
    whole = make(opt)
    for i in range(1, 9):
        step(whole, i)
        if i == 4:
            whole.save(0, i)
    resumed_opt = copy.deepcopy(opt)
    resumed_opt['path']['resume_state'] = str(tmp_path / 'training_states' / '4.state')
    resumed_opt['path']['pretrain_network_branches'] = ['gone.pth'] * 3  # not read when resuming
    state = load_resume_state(resumed_opt)
    model = build_model(resumed_opt)
    model.resume_training(state)
    assert state['iter'] == 4
    for i in range(5, 9):
        step(model, i)
    for net, other in ((model.net_g, whole.net_g), (model.net_g_ema, whole.net_g_ema)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], atol=1e-6, rtol=1e-5)
    assert model.get_current_learning_rate() == whole.get_current_learning_rate() == [0.0005]


def test_half_written_states_are_passed_over(opt, tmp_path, capsys):
    model = make(opt)
    states = tmp_path / 'training_states'
    for i in (8, 10):
        model.save(0, i)
    (states / '12.state').write_bytes((states / '10.state').read_bytes()[:500])
    (states / '14.state').write_bytes(b'')
    (states / '10_old.state').write_bytes(b'')
    (states / '.123.14.state').write_bytes(b'killed')
    (tmp_path / 'models' / '.saving_abc').mkdir()
    (tmp_path / 'models' / '.saving_abc' / 'net_g_14.pth').write_bytes(b'killed')
    (tmp_path / 'models' / '.notes').write_bytes(b'of the user')
    assert load_resume_state({**opt, 'auto_resume': True})['iter'] == 10
    assert capsys.readouterr().out.count('is incomplete; trying the previous state') == 2
    assert [path.name for path in tmp_path.rglob('.*')] == ['.notes'], 'what killed runs left is still there'


def test_a_complete_state_that_cannot_be_loaded_is_an_error(opt, tmp_path):
    make(opt).save(0, 8)
    torch.save({'iter': 10, 'function': print}, tmp_path / 'training_states' / '10.state')
    with pytest.raises(OptionError, match='10.state cannot be loaded'):
        load_resume_state({**opt, 'auto_resume': True})


def test_a_state_with_a_flipped_bit_is_an_error(opt, tmp_path):
    """torch.load would take it; the checksums of the archive tell."""
    make(opt).save(0, 8)
    path = tmp_path / 'training_states' / '8.state'
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [record for record in archive.infolist() if '/data/' in record.filename]  # not the pickle of the rest
    largest = max(tensors, key=lambda record: record.file_size)
    lengths = struct.unpack('<HH', data[largest.header_offset + 26:largest.header_offset + 30])  # of name and padding
    data[largest.header_offset + 30 + sum(lengths) + largest.file_size // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(OptionError, match='8.state cannot be loaded: .*is damaged: .* has changed'):
        load_resume_state({**opt, 'auto_resume': True})


def test_without_a_state_auto_resume_falls_back(opt, tmp_path):
    make(opt).save(0, 8)
    (tmp_path / 'training_states' / '8.state').rename(tmp_path / 'other.state')
    opt['path']['resume_state'] = str(tmp_path / 'other.state')
    assert load_resume_state({**opt, 'auto_resume': True})['iter'] == 8
    opt['path']['resume_state'] = None
    assert load_resume_state({**opt, 'auto_resume': True}) is None


@pytest.mark.slow
def test_validation_measures_routing(opt, tmp_path, caplog, monkeypatch):
    opt['val'].update(save_img=True, save_map=True)
    model = make(opt)
    spread(model.net_g)
    scalars, images = {}, {}

    class Logger:

        def add_scalar(self, name, value, current_iter):
            assert current_iter == 5
            scalars[name] = value

        def add_image(self, name, image, current_iter, dataformats):
            assert current_iter == 5 and dataformats == 'HWC'
            images[name] = image

    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    with caplog.at_level(logging.INFO):
        model.validation(DataLoader(Images()), 5, Logger(), save_img=True)
    assert model.net_g.training

    upscaler = TileUpscaler(model.net_g.eval(), 16, 12)
    counts, errors, spent, pixels = np.zeros(3), [[], [], []], 0., 0
    for item in Images():
        result = upscaler.upscale(item['lq'][None])
        image = result.image[0].clamp(0, 1).mul(255).round() - item['gt'].mul(255).round()
        class_map = torch.from_numpy(result.classes)
        for k in range(3):
            counts[k] += (result.plan.classes == k).sum()
            mask = np.kron(class_map == k, np.ones((4, 4))).astype(bool)
            errors[k] += image.numpy()[:, mask].flatten().tolist()
        spent += result.cost * class_map.numel()
        pixels += class_map.numel()
    assert counts.sum() == 1 + 3 + 4 and (counts > 0).sum() > 1, 'the test is void: one class took all'
    for k in range(3):
        assert scalars[f'routing/images/count_{k}'] == counts[k]
        assert scalars[f'routing/images/share_{k}'] == pytest.approx(counts[k] / counts.sum())
        assert f'class {k}: {100 * counts[k] / counts.sum():.1f} % ({counts[k]:.0f} tiles)' in caplog.text
        if counts[k]:
            psnr = 10 * np.log10(255**2 / np.mean(np.square(errors[k])))
            assert scalars[f'routing/images/psnr_{k}'] == pytest.approx(psnr)
        else:
            assert f'routing/images/psnr_{k}' not in scalars
    assert scalars['routing/images/cost'] == pytest.approx(spent / pixels)
    assert 'metrics/images/psnr' in scalars
    for i in range(3):
        image = cv2.imread(str(tmp_path / 'visualization' / str(i) / f'{i}_5.png'))
        picture = cv2.imread(str(tmp_path / 'visualization' / str(i) / f'{i}_5_map.png'))
        lq = Images()[i]['lq']
        assert image.shape[:2] == (4 * lq.shape[1], 4 * lq.shape[2])
        assert picture.shape[0] > image.shape[0], 'the map has no legend'
        assert np.array_equal(images[f'images/{i}/sr'][..., ::-1], image)
        assert images[f'images/{i}/difficulty_map'].shape == picture.shape


def test_a_failed_difficulty_map_keeps_the_file_before_it(opt, tmp_path, monkeypatch):
    opt['val']['save_map'] = True
    model = make(opt)
    model.validation(DataLoader(Images()), 5, None)
    file = tmp_path / 'visualization' / '0' / '0_5_map.png'
    before = file.read_bytes()

    def half(image, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr('cdnsr_basicsr.models.routed_validation.imwrite', half)
    with pytest.raises(OSError, match='disk full'):
        model.validation(DataLoader(Images()), 5, None)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


@pytest.mark.slow
def test_without_gt_and_metrics(opt):
    opt['val']['metrics'] = None
    model = make(opt)
    step(model)  # leaves the GT of a training batch behind

    class NoGT(Images):

        def __getitem__(self, index):
            return {key: value for key, value in super().__getitem__(index).items() if 'gt' not in key}

    model.validation(DataLoader(NoGT()), 1, None, save_img=False)


@pytest.mark.slow
def test_tested_network_is_the_ema(opt):
    opt['train']['ema_decay'] = 0.999
    model = make(opt)
    with torch.no_grad():
        model.net_g.branches[0].deconv.weight.add_(1)
        model.net_g.branches[1].deconv.weight.add_(1)
        model.net_g.branches[2].deconv.weight.add_(1)
    lq = torch.rand(1, 3, 20, 20)
    model.feed_data({'lq': lq, 'lq_path': ['a']})
    model.test()
    assert torch.equal(model.output, TileUpscaler(model.net_g_ema.eval(), 16, 12).upscale(lq).image)


@pytest.mark.slow
def test_mixed_branches_with_basicsr_archs_train(opt):
    msrresnet = dict(type='MSRResNet', num_feat=4, num_block=1, upscale=4)
    opt['network_g']['branches'] = [dict(type='Interpolation', upscale=4), carn(4), msrresnet]
    model = make(opt)
    step(model)
    assert model.costs[0] == 0 and model.costs[-1] == 1
    model.feed_data({'lq': torch.rand(1, 3, 9, 30), 'lq_path': ['a']})
    model.test()
    assert model.output.shape == (1, 3, 36, 120)


def test_gt_of_another_size_is_refused(opt):
    model = make(opt)
    with pytest.raises(OptionError, match=r'b.png: GT of \(18, 18\) is not x4 of LQ of \(9, 9\)'):
        model.feed_data(dict(lq=torch.rand(1, 3, 9, 9), gt=torch.rand(1, 3, 18, 18), lq_path=['a'], gt_path='b.png'))


def test_branch_of_another_scale_is_refused(opt):
    opt['network_g']['branches'][1] = dict(type='RRDBNet', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=1, scale=2)
    with pytest.raises(OptionError, match=r'network_g.branches\[1\]: enlarges 2 times; expected a network of scale 4'):
        make(opt)


def test_branches_out_of_order_are_warned_of(opt, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    opt['network_g']['branches'].reverse()
    make(opt)
    assert 'not listed from cheap to expensive: relative costs are [1.0, ' in caplog.text


def test_swapped_branch_checkpoint_is_one_line(opt, tmp_path):
    (tmp_path / 'text.pth').write_text('no weights')
    opt['path']['pretrain_network_branches'] = [str(tmp_path / 'text.pth')] * 3
    with pytest.raises(OptionError, match='text.pth: not a readable checkpoint'):
        make(opt)


@pytest.fixture
def file_opt(opt):
    """The options as they stand in a file, without what BasicSR adds when it has read it."""
    added = ('dist', 'rank', 'world_size', 'is_train', 'auto_resume', 'root_path')
    train = {'name': 'train', 'type': 'LabeledPatchDataset', 'gt_size': 32, 'batch_size_per_gpu': 4}
    left = {key: value for key, value in opt.items() if key not in added}
    return {**left, 'path': {}, 'datasets': {'train': train}}


MISTAKES = [
    (dict(scale=2), 'scale: is 2, but network_g.upscale is 4'),
    (dict(tile=dict(stride=4)), 'tile.stride: unknown key; accepted: patch_size, step'),
    (dict(tile=dict(patch_size=16, step=17)), 'tile.step: expected an integer from 1 to 16, but got 17'),
    (dict(tile=dict(patch_size=1.5)), 'tile.patch_size: expected an integer at least 1, but got 1.5'),
    (dict(path=dict(pretrain_network_branches=['a'])), 'pretrain_network_branches: expected a list of 3 checkpoints'),
    (dict(network_t=dict(type='RCAN')), 'network_t: a teacher needs both network_t and path.pretrain_network_t'),
    (dict(network_g=dict(type='RCAN')), "network_g.type: CDNSRModel needs type CDNSR, but got 'RCAN'"),
    (dict(
        network_g=dict(
            type='CDNSR',
            branches=[fsrcnn(), dict(type='Spandrel', architecture='DAT')],
            classifier=dict(type='PatchClassifier'))),
     'network_g.branches[1].type: Spandrel networks are not trained as branches; basicsr route combines '
     'them without training'),
]


@pytest.mark.parametrize('change,message', MISTAKES)
def test_mistakes_are_named(file_opt, change, message):
    CDNSRModel.check_options(file_opt, True)
    with pytest.raises(OptionError) as error:
        CDNSRModel.check_options({**file_opt, **change}, True)
    assert message in str(error.value)


TRAIN_MISTAKES = [
    (dict(freeze=['branches', 'classifier']), 'train.freeze: accepted: [branches], [classifier] or []'),
    (dict(freeze='branches'), 'train.freeze: accepted: [branches], [classifier] or []'),
    (dict(clas_opt={}), 'train.clas_opt: unknown key; accepted: average_opt, balance, '),
    (dict(freeze=['branches']), 'train.freeze: branches without weights would stay random'),
    (dict(pixel_opt=None), 'train.pixel_opt: a loss is needed: pixel_opt or branch_opt'),
    (dict(precision='half'), "train.precision: accepted: float32, bfloat16, float16; got 'half'"),
    (dict(balance='on'), "train.balance: accepted: warn, auto; got 'on'"),
    (dict(balance='auto', average_opt=None), 'train.balance: auto raises the weight of average_opt, which is missing'),
    (dict(compile='yes'), "train.compile: accepted: true, false; got 'yes'"),
    (dict(collapse_share=0), 'train.collapse_share: expected a number from 0.01 to 1, but got 0'),
    (dict(collapse_iter=1.5), 'train.collapse_iter: expected an integer at least 1, but got 1.5'),
    (dict(feature_extractor=dict(layer='conv1_1')), 'train.feature_extractor.layer: unknown key; accepted: weights'),
    (dict(label_opt=dict(type='LabelLoss')), 'train.label_opt: needs datasets.train.label_file'),
    (dict(kd_opt=dict(type='CSDLoss')), "train.kd_opt.type: accepted: KDL1Loss; got 'CSDLoss'"),
    (dict(branch_opt=dict(type='GANLoss')), 'train.branch_opt.type: accepted: L1Loss, MSELoss, CharbonnierLoss; got'),
    (dict(pixel_opt=dict(type='L1Loss', reduction='none')), 'train.pixel_opt.reduction: none leaves no single value'),
    (dict(class_opt=dict(type='ClassLoss', loss_weight='1')),
     'train.class_opt.loss_weight: expected a number at least 0'),
    (dict(csd_opt=dict(type='CSDLoss', num_negatives=2.5)),
     'train.csd_opt.num_negatives: expected an integer at least 1'),
    (dict(csd_opt=dict(type='CSDLoss', layer_weights=dict(relu1_1=None))), 'layer_weights.relu1_1: expected a number'),
    (dict(tau_min=0), 'train.tau_min: expected a number from 0.01 to 1, but got 0'),
]


@pytest.mark.parametrize('change,message', TRAIN_MISTAKES)
def test_mistakes_in_train_are_named(file_opt, change, message):
    file_opt['train'].update(change)
    with pytest.raises(OptionError) as error:
        CDNSRModel.check_options(file_opt, True)
    assert message in str(error.value)


@pytest.mark.parametrize('name', ['class', 'average', 'flops', 'label', 'kd', 'feature', 'csd', 'cs'])
def test_a_loss_that_reaches_frozen_parts_only_is_refused(file_opt, name):
    trained = 'classifier' if name in ('class', 'average', 'flops', 'label') else 'branches'
    file_opt['train'].update({f'{other}_opt': None for other in ('class', 'average', 'flops')})
    file_opt['train'].update({f'{name}_opt': {'type': LOSSES[name].types[0]}, 'freeze': [trained]})
    file_opt['path'].update(pretrain_network_g='a.pth')
    with pytest.raises(
            OptionError, match=f'train.{name}_opt: trains the {trained} only, but train.freeze freezes them'):
        CDNSRModel.check_options(file_opt, True)


@pytest.mark.parametrize('name', ['csd', 'cs'])
def test_contrast_needs_a_batch(file_opt, name):
    file_opt['train'].update({f'{name}_opt': {'type': LOSSES[name].types[0]}})
    file_opt['datasets']['train']['batch_size_per_gpu'] = 1
    with pytest.raises(OptionError, match='takes negatives from the other samples of a batch'):
        CDNSRModel.check_options(file_opt, True)
    file_opt['datasets']['train'].update(batch_size_per_gpu=2, gt_size=12)
    with pytest.raises(
            OptionError, match='VGG19 needs patches of at least 16 pixels, but datasets.train.gt_size is 12'):
        CDNSRModel.check_options(file_opt, True)


def test_a_teacher_without_pupils_and_labels_without_their_dataset_are_refused(file_opt):
    file_opt['network_t'] = dict(type='FSRCNN')
    file_opt['path']['pretrain_network_t'] = 'teacher.pth'
    with pytest.raises(OptionError, match='network_t: teaches nothing without kd_opt, feature_opt, csd_opt, cs_opt'):
        CDNSRModel.check_options(file_opt, True)
    file_opt['train'].update(label_opt=dict(type='LabelLoss'), kd_opt=dict(type='KDL1Loss'))
    file_opt['datasets']['train'].update(type='PairedImageDataset', label_file='labels.txt')
    with pytest.raises(
            OptionError, match='train.label_opt: needs a LabeledPatchDataset, but datasets.train.type is Pair'):
        CDNSRModel.check_options(file_opt, True)


@pytest.mark.slow
def test_branches_of_equal_cost_cannot_be_traded(opt):
    opt['network_g']['branches'] = [carn(4)] * 3
    with pytest.raises(OptionError, match='train.flops_opt: all branches cost the same'):
        make(opt)


@pytest.mark.parametrize('train', [dict(precision='bfloat16'), dict(compile=True)])
def test_what_threads_on_several_gpus_cannot_do_is_refused(opt, train):
    opt.update(num_gpu=2)
    opt['train'].update(train)
    model = CDNSRModel.__new__(CDNSRModel)
    model.opt, model.is_train, model.device = opt, True, torch.device('cpu')
    with pytest.raises(OptionError, match='on 2 GPUs needs a process for each: bash scripts/dist_train.sh'):
        model.model_to_device(build_network(opt['network_g']))


def test_validation_follows_fused_optimizers(opt):
    opt['train']['optim_g'].update(fused=True, lr=0.1)
    opt['train']['ema_decay'] = 0
    model = build_model(opt)
    lq = torch.rand(1, 3, 20, 20)

    def validated():
        model.begin_validation('val', 1, None)
        model.feed_data({'lq': lq, 'lq_path': ['a.png']})
        model.test()
        return model.output

    before = validated()
    model.feed_data({'lq': torch.rand(4, 3, 8, 8), 'gt': torch.rand(4, 3, 32, 32), 'lq_path': ['a'] * 4})
    model.optimize_parameters(1)
    assert not torch.equal(validated(), before)


@pytest.mark.slow
def test_branches_of_any_window_train_and_validate(opt):
    opt['network_g']['branches'][1:] = [swinir(6), swinir(7)]
    opt['datasets'] = {'train': {'gt_size': 4 * 42}}
    model = make(opt)
    data = {key: torch.rand(2, 3, side, side) for key, side in (('lq', 42), ('gt', 168))}
    model.feed_data(dict(data, lq_path=['a'] * 2))
    model.optimize_parameters(1)
    model.validation(DataLoader(Images()), 1, None)
    assert model.upscaler(model.net_g).multiple == 42 and model.metric_results['psnr'] > 0

    opt['datasets']['train']['gt_size'] = 128
    words = r'gt_size: 128 makes LQ patches of 32 pixels, but network_g.branches\[1\] takes multiples of 6 only, such '
    with pytest.raises(OptionError, match=f'{words}as gt_size 120 or 144'):
        make(opt)
