"""Distillation inside CDNSRModel: who learns, from whom, and what is computed how often."""
import copy
import pytest
import torch

from basicsr.archs import build_network
from basicsr.models import build_model
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.options import OptionError
from tests.helpers import step

DISTILLATION = {
    'kd': dict(type='KDL1Loss'),
    'feature': dict(type='FeatureDistillLoss', layer_weights=dict(conv1_2=1)),
    'csd': dict(type='CSDLoss', layer_weights=dict(relu1_1=1), num_negatives=2),
    'cs': dict(type='ContrastLoss', layer='relu1_1', num_dim=8, num_negatives=2),
}


@pytest.fixture
def distil_opt(opt):
    """Options with the named losses only, the pixel loss being switched off by its weight."""

    def make_(*names, **train):
        opt['train'].update({f'{name}_opt': None for name in ('class', 'average', 'flops')})
        opt['train'].update({f'{name}_opt': DISTILLATION[name] for name in names})
        opt['train'].update(feature_extractor=dict(weights='random'), pixel_opt=dict(type='L1Loss', loss_weight=0))
        opt['train'].update(train)
        return opt

    return make_


def make(opt):
    return build_model(copy.deepcopy(opt))


def teacher(opt, tmp_path):
    opt['network_t'] = dict(type='FSRCNN', num_feat=8, upscale=4)
    opt['path']['pretrain_network_t'] = str(tmp_path / 'teacher.pth')
    torch.save({'params': build_network(opt['network_t']).state_dict()}, tmp_path / 'teacher.pth')


@pytest.mark.slow
@pytest.mark.parametrize('external', [False, True])
@pytest.mark.parametrize('name', list(DISTILLATION))
def test_each_loss_trains_exactly_the_students(distil_opt, tmp_path, name, external):
    opt = distil_opt(name)
    if external:
        teacher(opt, tmp_path)
    model = make(opt)
    before = copy.deepcopy(model.net_g.state_dict())
    step(model)
    assert model.get_current_log()[f'l_{name}'] > 0

    def learns(module):
        return any(param.grad is not None and param.grad.abs().sum() > 0 for param in module.parameters())

    assert [learns(branch) for branch in model.net_g.branches] == [True, True, external]
    assert not learns(model.net_g.classifier)
    if not external:
        after = model.net_g.branches[2].state_dict()
        assert all(torch.equal(value, before[f'branches.2.{key}']) for key, value in after.items())
    if name == 'cs':
        assert learns(model.losses['cs'].head)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['kd', 'feature', 'csd'])
@pytest.mark.parametrize('external', [False, True])
def test_students_come_nearer_to_the_teacher(distil_opt, tmp_path, name, external):
    opt = distil_opt(name, total_iter=1000)
    opt['train']['optim_g']['lr'] = 0.003
    opt['train']['scheduler']['milestones'] = [1000]
    if external:
        teacher(opt, tmp_path)
    model, values = make(opt), []
    with torch.no_grad():
        model.net_g.branches[2].deconv.weight.mul_(1.3)  # something to learn
    for i in range(1, 31):
        step(model, i)
        values.append(model.get_current_log()[f'l_{name}'])
    assert values[-1] < 0.8 * values[0]


@pytest.mark.slow
def test_features_are_computed_once_per_tensor_and_step(distil_opt):
    model = make(distil_opt('kd', 'feature', 'csd', 'cs'))
    images = []
    model.distillation.extractor.register_forward_hook(lambda module, args, output: images.append(len(args[0])))
    step(model)
    batch = len(model.lq)
    assert images == [2 * batch, 2 * batch]  # two students with a graph; teacher and upsampled LQ without
    log = model.get_current_log()
    assert [key for key in log if key.startswith('l_')] == ['l_pixel', 'l_kd', 'l_feature', 'l_csd', 'l_cs']


@pytest.mark.slow
@pytest.mark.parametrize('external', [False, True])
def test_what_the_losses_compare(distil_opt, tmp_path, external):
    opt = distil_opt('kd', 'feature', 'csd', 'cs')
    if external:
        teacher(opt, tmp_path)
    model = make(opt)
    distillation = model.distillation
    lq = torch.rand(2, 3, 8, 8)
    _, routing = model.net_g(lq, return_routing=True)
    found = distillation.arguments(lq, routing, model.teach(lq))
    outputs = routing.branch_outputs
    expected_teacher = model.net_t(lq) if external else outputs[2]
    students = outputs if external else outputs[:2]
    upsampled = torch.nn.functional.interpolate(lq, scale_factor=4, mode='bicubic', align_corners=False)
    assert all(a is b for a, b in zip(found['kd'][0], outputs)) and found['kd'][1] is routing.weights
    assert torch.equal(found['kd'][2], expected_teacher) if external else found['kd'][2] is None

    def equal(features, image):
        alone = distillation.extractor(image)
        return set(features) == set(alone) and all(
            torch.allclose(features[layer], alone[layer], atol=1e-5) for layer in alone)

    for name in ('csd', 'cs'):
        of_students, of_teacher, negatives = found[name]
        assert len(of_students) == len(students)
        assert all(equal(features, image) for features, image in zip(of_students, students))
        assert equal(of_teacher, expected_teacher) and equal(negatives, upsampled)
        assert not any(maps.requires_grad for maps in (*of_teacher.values(), *negatives.values()))
        assert all(maps.requires_grad for features in of_students for maps in features.values())
    assert found['feature'][:2] == found['csd'][:2] and found['feature'][2] is routing.weights


def test_without_feature_losses_no_extractor_is_built(distil_opt):
    model = make(distil_opt('kd'))
    assert model.distillation.extractor is None
    step(model)


@pytest.mark.slow
def test_distillation_with_a_frozen_classifier(distil_opt, tmp_path):
    opt = distil_opt('kd', 'cs', freeze=['classifier'])
    model = make(opt)
    before = copy.deepcopy(model.net_g.classifier.state_dict())
    step(model)
    assert all(torch.equal(value, before[key]) for key, value in model.net_g.classifier.state_dict().items())
    assert model.guard is None


@pytest.mark.slow
def test_projection_head_is_optimised_and_resumed_but_not_in_checkpoints(distil_opt, tmp_path):
    model = make(distil_opt('cs'))
    before = copy.deepcopy(model.losses['cs'].state_dict())
    for i in range(1, 4):
        step(model, i)
    model.save(0, 3)
    head = model.losses['cs'].state_dict()
    assert not torch.equal(head['head.0.weight'], before['head.0.weight'])
    resumed = make(distil_opt('cs'))
    resumed.resume_training(torch.load(tmp_path / 'training_states' / '3.state', weights_only=True))
    assert all(torch.equal(value, head[key]) for key, value in resumed.losses['cs'].state_dict().items())
    moments = [state['exp_avg'] for state in resumed.optimizer_g.state_dict()['state'].values()]
    assert [moment.shape for moment in moments[-4:]] == [value.shape for value in head.values()]
    content = torch.load(tmp_path / 'models' / 'net_g_3.pth', weights_only=True)
    assert not [key for key in content['params'] if 'head' in key]
    load_network(str(tmp_path / 'models' / 'net_g_3.pth'))


def test_teacher_is_frozen_and_of_the_same_scale(distil_opt, tmp_path):
    opt = distil_opt('kd')
    teacher(opt, tmp_path)
    model = make(opt)
    net_t = model.net_t
    saved = torch.load(tmp_path / 'teacher.pth', weights_only=True)['params']
    step(model)
    assert not net_t.training and not any(param.requires_grad for param in net_t.parameters())
    assert all(torch.equal(value, saved[key]) for key, value in net_t.state_dict().items())
    opt['network_t']['upscale'] = 3
    with pytest.raises(OptionError, match='network_t: enlarges 3 times; expected a network of scale 4'):
        make(opt)


def test_weights_that_cannot_be_had_are_an_option_error(distil_opt):
    opt = distil_opt('csd', feature_extractor=dict(weights='nowhere.pth'))
    with pytest.raises(OptionError, match="train.feature_extractor: expected 'imagenet', 'random' or a file"):
        make(opt)
