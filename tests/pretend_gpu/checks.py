"""What holds on a GPU too. test_pretend_gpu.py runs these in a process of its own, on a pretended one: with -p
tests.pretend_gpu.pretend, which has to come before this package.
"""
import copy
import numpy as np
import pytest
import random
import torch
from torch import nn

from basicsr.archs import build_network
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from basicsr.models import build_model
from cdnsr_basicsr.archs import CARN_M
from cdnsr_basicsr.inference import make_upscaler, pixel_upscaler, tile_upscaler
from cdnsr_basicsr.inference.pictures import to_arrays, upscaled_strips
from cdnsr_basicsr.inference.tiling import Canvas, TensorRows
from tests.helpers import carn, fsrcnn, pcsr, photographs, routed, spread
from tests.pretend_gpu.pretend import NOT_YET, Pretended, PretendedGPU, arrive, limited, seen

LOSSES = dict(
    pixel_opt=dict(type='L1Loss', loss_weight=100.),
    class_opt=dict(type='ClassLoss'),
    average_opt=dict(type='AverageLoss'),
    flops_opt=dict(type='FLOPsLoss', target=0.1),
    label_opt=dict(type='LabelLoss', num_iter=5))
CDNSR = dict(type='CDNSR', upscale=4, branches=[fsrcnn(2 * i + 2) for i in range(3)])
CLASSIFIED = dict(CDNSR, classifier=dict(type='PatchClassifier', num_feat=8))
PREDICTED = dict(CDNSR, classifier=dict(type='ErrorPredictor', num_feat=8))
PIXEL = dict(pixel_opt=dict(type='L1Loss'))
# model, network and training of each kind of training
TRAININGS = {
    'CDNSR': ('CDNSRModel', CLASSIFIED, LOSSES),
    'ClassSR': ('CDNSRModel', dict(CLASSIFIED, mixture='softmax'), LOSSES),
    'errors, as they come out': ('CDNSRModel', PREDICTED, dict(PIXEL, error_opt=dict(type='ErrorLoss'))),
    'known errors': ('CDNSRModel', PREDICTED, dict(error_opt=dict(type='ErrorLoss'), freeze=['branches'])),
    'distillation': ('CDNSRModel', CLASSIFIED, dict(
        PIXEL, kd_opt=dict(type='KDL1Loss'), csd_opt=dict(type='CSDLoss'),
        feature_extractor=dict(weights='random'))),
    'PCSR, phase 0': ('PCSRModel', pcsr(fsrcnn(8)), dict(PIXEL, phase=0)),
    'PCSR, phase 1': ('PCSRModel', pcsr(carn(8)), dict(PIXEL, phase=1, average_opt=dict(type='AverageLoss'))),
    'one branch': ('FastSRModel', carn(), PIXEL),
    'Muon': ('FastSRModel', carn(), dict(PIXEL, optim_g=dict(type='Muon', lr=1e-3))),
    'ETDS': ('ETDSModel', dict(type='ETDS', num_feat=10, num_block=2, num_residual_feat=4), dict(
        PIXEL, residual_opt=dict(type='L1Loss'), residual_freeze_iter=2)),
}  # yapf: disable


@pytest.fixture(autouse=True)
def gpu():
    """The device cuda:0, on which nothing has happened yet."""
    with PretendedGPU():
        seen.clear()
        yield
        arrive()
        assert not seen.races and not seen.strays
        seen.clear()


def options(folder, training, num_gpu, **train):
    """Options of a training, as BasicSR hands them to a model."""
    kind, net, settings = TRAININGS[training]
    for name in ('models', 'training_states', 'visualization'):
        (folder / name).mkdir(exist_ok=True)
    common = dict(total_iter=10, optim_g=dict(type='Adam', lr=1e-3), ema_decay=0.5)
    common['scheduler'] = dict(type='MultiStepLR', milestones=[5], gamma=0.5)
    opt = dict(name='tiny', model_type=kind, scale=4, num_gpu=num_gpu, dist=False, rank=0, world_size=1, is_train=True)
    opt.update(auto_resume=False, root_path=str(folder), network_g=copy.deepcopy(net))
    opt['train'] = copy.deepcopy({**common, **settings, **train})
    opt['path'] = {name: str(folder / name) for name in ('models', 'training_states', 'visualization')}
    return opt


def batch(number, pinned):
    """Patches, labels and errors of them; for a GPU in pinned memory, as data loaders give them."""
    generator = torch.Generator().manual_seed(number)
    lq = torch.rand(4, 3, 12, 12, generator=generator)
    data = dict(lq=lq, gt=nn.functional.interpolate(lq, scale_factor=4, mode='bicubic').clamp(0, 1))
    data.update(label=torch.arange(4) % 3, errors=50 * torch.rand(4, 3, generator=generator) + 1)
    return {name: value.pin_memory() if pinned else value for name, value in data.items()}


def trained(folder, training, num_gpu, steps=3, **train):
    """A model after some steps, the last of which has been watched."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    model = build_model(options(folder, training, num_gpu, **train))
    for i in range(1, steps + 1):
        data = batch(i, bool(num_gpu))
        torch.manual_seed(i)
        seen.clear()
        model.update_learning_rate(i)
        model.feed_data(data)
        model.optimize_parameters(i)
    return model


def weights(model):
    nets = [model.get_bare_model(model.net_g), model.net_g_ema]
    return torch.cat([param.detach().cpu().flatten() for net in nets for param in net.parameters()])


@pytest.mark.parametrize('training', TRAININGS)
def test_a_training_is_that_of_the_cpu_and_no_step_waits(tmp_path, training):
    model = trained(tmp_path, training, 1)
    assert not seen.waits, seen.waits
    assert all(isinstance(param, Pretended) for param in model.net_g.parameters())
    log, expected = model.get_current_log(), trained(tmp_path, training, 0)
    assert torch.equal(weights(model), weights(expected))
    assert log == expected.get_current_log()


@pytest.mark.parametrize('training,precision', [('CDNSR', 'float16'), ('ETDS', 'float16'), ('one branch', 'bfloat16')])
def test_no_step_in_half_precision_waits(tmp_path, training, precision):
    trained(tmp_path, training, 1, precision=precision)
    assert not seen.waits, seen.waits


class Batches:
    """A data loader."""

    def __iter__(self):
        return (batch(i, True) for i in range(1, 4))


def test_batches_that_are_prefetched_are_not_waited_for(tmp_path):
    model = build_model(options(tmp_path, 'CDNSR', 1))
    prefetcher, i = CUDAPrefetcher(Batches(), dict(num_gpu=1)), 0
    while (data := prefetcher.next()) is not None:
        i += 1
        assert data['label'].is_cuda
        seen.clear()
        model.feed_data(data)
        model.optimize_parameters(i)
        assert i == 1 or not seen.waits, seen.waits  # what counts classes gets to the GPU in the first step
    assert i == 3


def test_what_makes_its_own_lq_waits_for_nothing_of_this_package(tmp_path):
    """BasicSR's degradation does: it counts the grey levels of each image for its noise, and draws on the host."""
    opt = options(tmp_path, 'one branch', 1)
    opt.update(model_type='FastRealESRNetModel', queue_size=4)
    opt['datasets'] = dict(train=dict(type='PhotographDataset', gt_size=32, batch_size_per_gpu=2))
    model = build_model(opt)
    for i in range(1, 5):
        seen.clear()
        model.feed_data({name: value.pin_memory() for name, value in photographs().items()})
        model.optimize_parameters(i)
    own = {line for line in seen.waits if ' at models/' in line}
    assert not {line for line in own if 'models/degradation.py' not in line}, own


IMAGE = torch.rand(1, 3, 70, 90, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 90)**2
MAPPED = dict(CDNSR, classifier=dict(type='ErrorMap', num_feat=8))
# network, limits, and how often the host waits for an image, and for each strip, besides once in the end
ENGINES = {
    'one network': (carn(8), {}, 0, 0),
    'classes': (CLASSIFIED, {}, 1, 0),
    'classes, with a budget': (CLASSIFIED, dict(budget=0.6), 1, 0),
    'predicted errors': (PREDICTED, {}, 1, 0),
    'predicted errors, with a limit': (PREDICTED, dict(max_loss=0.1), 1, 0),
    'mapped errors': (MAPPED, dict(budget=0.6), 1, 0),
    'PCSR': (pcsr(fsrcnn(8)), {}, 0, 1),
    'PCSR, with a budget': (pcsr(carn(8)), dict(budget=0.7), 0, 1),
}


def network(kind):
    block = ENGINES[kind][0]
    if 'PCSR' in kind:
        return routed(block, IMAGE[:, :, :30, :30])
    net = build_network(copy.deepcopy(block)).eval()
    return spread(net) if 'classes' in kind else net


def engines(kind, net=None):
    """The engine on the CPU, and on the GPU."""
    net, limits = network(kind) if net is None else net, ENGINES[kind][1]
    return [make_upscaler(copy.deepcopy(net).to(device), 24, 20, **limits) for device in ('cpu', 'cuda')]


@pytest.fixture(params=[1, 4])
def strips(request, monkeypatch):
    """How many strips an image of 70 rows has."""
    if request.param > 1:
        monkeypatch.setattr(tile_upscaler, 'MERGED_BYTES', 1)  # so that blocks are not higher
        monkeypatch.setitem(tile_upscaler.CANVAS_BYTES, 'cuda', 1)
        monkeypatch.setattr(pixel_upscaler, 'STRIP_PIXELS', 24 * 90)
    return request.param


@pytest.mark.parametrize('kind', ENGINES)
def test_an_image_is_that_of_the_cpu_and_is_waited_for_as_often_as_said(kind, strips):
    cpu, gpu = engines(kind)
    of_image, of_strip = ENGINES[kind][2:]
    lq, expected = IMAGE.to('cuda'), cpu.upscale(IMAGE)
    gpu.upscale(lq)  # copies the weights
    seen.clear()
    found = gpu.upscale(lq)
    assert seen.waits.total() == of_image + of_strip * strips + 1, seen.waits
    assert isinstance(found.image, Pretended) and found.counts == expected.counts
    assert (found.classes == expected.classes).all() and found.cost == pytest.approx(expected.cost)
    torch.testing.assert_close(found.image.cpu(), expected.image, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ENGINES)
def test_pixels_arrive_when_they_are_waited_for(kind, strips):
    cpu, gpu = engines(kind)
    of_image, of_strip = ENGINES[kind][2:]
    pixels = (255 * IMAGE[0].permute(1, 2, 0)).byte().numpy()
    expected = np.concatenate(list(upscaled_strips(cpu, pixels)[1]))
    for _ in range(2):
        seen.clear()
        found = np.concatenate(list(upscaled_strips(gpu, pixels)[1]))
    handed_out = strips + ('PCSR' in kind)  # the last row of pixels is smoothed only when no further one comes
    assert seen.waits.total() == of_image + of_strip * strips + handed_out, seen.waits
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_a_strip_is_handed_out_while_the_next_one_is_computed():
    order = []

    def computed():
        for number in range(3):
            order.append(f'computed {number}')
            yield torch.full((300, 2, 3), number / 255, device='cuda')

    for part in to_arrays(computed(), np.dtype(np.uint8), gray=False):
        order.append(f'out {part.flat[0]}')
    both = [f'out {number}' for number in range(3) for _ in range(2)]  # of 256 rows, and of 44
    assert order == ['computed 0', 'computed 1', *both[:2], 'computed 2', *both[2:]]


def test_a_prediction_is_one_copy():
    _, gpu = engines('predicted errors')
    gpu.upscale(IMAGE)
    seen.clear()
    prediction = gpu.predict(TensorRows(IMAGE))
    for _ in range(3):
        gpu.plan(TensorRows(IMAGE), prediction=prediction)
    assert seen.waits.total() == 1, seen.waits


@pytest.mark.parametrize('kind,share', [('classes', 0.6), ('mapped errors', 0.3), ('PCSR', 0.6), ('PCSR', 0.3)])
def test_an_image_survives_a_shortage_of_memory(monkeypatch, kind, share):
    monkeypatch.setattr(tile_upscaler, 'MERGED_BYTES', 1)  # so that strips can be as low as a row of tiles
    cpu, gpu = engines(kind)
    pixels = (255 * IMAGE[0].permute(1, 2, 0)).byte().numpy().repeat(3, axis=0)
    expected = np.concatenate(list(upscaled_strips(cpu, pixels)[1]))
    list(upscaled_strips(gpu, pixels)[1])
    seen.clear()
    before = seen.bytes
    list(upscaled_strips(gpu, pixels)[1])
    allowed = int(share * (seen.peak - before))
    seen.clear()
    with limited(allowed):
        found = np.concatenate(list(upscaled_strips(gpu, pixels)[1]))
    assert 0 < seen.shortages < 20 and seen.peak <= before + allowed and seen.bytes == before
    difference = np.abs(found.astype(int) - expected)  # where blocks have been divided, too
    assert difference.max() <= 3 and (difference > 0).mean() < 1e-2


def test_mistakes_are_seen(tmp_path):
    x, host = torch.rand(3, device='cuda'), torch.empty(3, pin_memory=True)
    with pytest.raises(RuntimeError, match='same device'):
        x + torch.rand(3)
    host.copy_(x, non_blocking=True)
    assert (host == NOT_YET).all()  # what is read too early is wrong
    torch.cuda.synchronize()
    assert torch.equal(host, x.cpu())
    assert float(x.sum()) > 0
    assert {line.split(' at ')[0] for line in seen.waits} == {'synchronize', 'copy to the host', '_local_scalar_dense'}
    x.copy_(host, non_blocking=True)
    host.zero_()  # too early
    arrive()
    assert seen.races.total() == 1
    with torch.cuda.stream(torch.cuda.Stream()):
        x + 1
    assert seen.strays.total() == 1
    seen.races.clear(), seen.strays.clear()


def test_one_wrong_operation_on_the_gpu_is_seen(tmp_path, monkeypatch):
    """So that all that equals the CPU above has been computed by what is looked at."""
    add = Canvas.add
    monkeypatch.setattr(Canvas, 'add', lambda self, block, image: add(self, block, image * (1 + 1e-3 * self.summed)))
    with pytest.raises(AssertionError, match='not close'):
        test_an_image_is_that_of_the_cpu_and_is_waited_for_as_often_as_said('classes', 1)
    forward = CARN_M.forward
    monkeypatch.setattr(CARN_M, 'forward', lambda self, x: forward(self, x) * (1 + 1e-6 * x.is_cuda))
    with pytest.raises(AssertionError):
        test_a_training_is_that_of_the_cpu_and_no_step_waits(tmp_path, 'one branch')
