"""The front door for Python: settings, load, and the kinds of images that an upscaler takes."""
import numpy as np
import pytest
import subprocess
import sys
import torch
from dataclasses import fields
from PIL import Image

import cdnsr_basicsr as sr
from basicsr.archs import build_network
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.cli import build_parser
from cdnsr_basicsr.cli.arguments import FLAGS, settings_of
from cdnsr_basicsr.conversion.convert import load_network
from cdnsr_basicsr.inference.image_io import ImageError, read_image
from cdnsr_basicsr.settings import Settings
from tests.helpers import carn, fsrcnn, spread


@pytest.fixture
def model(tmp_path, tiny_net):
    torch.manual_seed(3)
    net = spread(build_network(tiny_net()).eval())
    path = tmp_path / 'cdnsr.pth'
    save_checkpoint({'params': net.state_dict(), 'network_g': tiny_net(), 'scale': 4}, str(path))
    return str(path)


@pytest.fixture
def upscaler(model):
    return sr.load(model, patch_size=16, step=14)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)


def expected(model, pixels):
    """What the engine makes of the picture as a tensor, in 8 bits."""
    lq = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
    image = sr.load(model, patch_size=16, step=14).upscale(lq).image
    return image[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.slow
def test_a_script_needs_neither_register_nor_basicsr(model, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    code = (f'import cdnsr_basicsr as sr, sys; assert "torch" not in sys.modules; '
            f'print(sr.load({model!r}).upscale({str(tmp_path / "a.png")!r}).image.shape)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == '(92, 124, 3)\n', done.stderr


@pytest.mark.slow
def test_the_result_is_of_the_kind_of_the_image(upscaler, model, pixels, tmp_path):
    result = expected(model, pixels)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    for source in (pixels, tmp_path / 'a.png', str(tmp_path / 'a.png')):
        image = upscaler.upscale(source).image
        assert isinstance(image, np.ndarray) and image.dtype == np.uint8 and np.array_equal(image, result)
    image = upscaler.upscale(Image.fromarray(pixels)).image
    assert isinstance(image, Image.Image) and image.mode == 'RGB' and np.array_equal(np.asarray(image), result)
    deep = upscaler.upscale(pixels.astype(np.uint16) * 257).image
    assert deep.dtype == np.uint16 and np.abs(deep / 257 - result).max() <= 0.51
    for dtype in (np.float32, np.float64):
        image = upscaler.upscale((pixels / 255).astype(dtype)).image
        assert image.dtype == dtype and np.abs(255 * image - result).max() <= 0.51
        assert 0 <= image.min() and image.max() <= 1
    lq = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
    assert isinstance(upscaler.upscale(lq).image, torch.Tensor) and upscaler.upscale(lq).image.shape == (1, 3, 92, 124)


@pytest.mark.parametrize('shape', [(9, 12), (9, 12, 1), (9, 12, 2), (9, 12, 4)])
def test_gray_and_alpha(upscaler, shape):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    assert upscaler.upscale(image).image.shape == (36, 48, *shape[2:])


@pytest.mark.parametrize('mode,result', [('L', 'L'), ('LA', 'LA'), ('RGBA', 'RGBA'), ('P', 'RGB'), ('1', 'L'),
                                         ('CMYK', 'RGB'), ('I;16', 'I;16')])
def test_modes_of_pil(upscaler, pixels, mode, result):
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(pixels)
    upscaled = upscaler.upscale(image if mode == 'I;16' else image.convert(mode)).image
    assert (upscaled.mode, upscaled.size) == (result, (124, 92))


def test_a_pil_image_keeps_its_profile_and_is_upright(upscaler, pixels):
    image = Image.fromarray(pixels)
    image.info['icc_profile'] = b'a profile'
    image.getexif()[0x112] = 6  # stored lying on its side
    upscaled = upscaler.upscale(image).image
    assert upscaled.info['icc_profile'] == b'a profile' and upscaled.size == (92, 124)


def test_what_the_result_tells(upscaler, pixels):
    result = upscaler.upscale(pixels)
    assert result.classes.shape == (23, 31) and result.classes.dtype == np.uint8
    assert set(np.unique(result.classes)) <= {0, 1, 2} and sum(result.counts) == len(result.plan.tiling)
    assert 0 < result.cost and 0 < result.seconds
    drawn = result.map()
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3 and drawn.shape[0] > drawn.shape[1] * 23 // 31
    lq = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
    assert np.array_equal(upscaler.upscale(lq).map(), drawn)


@pytest.mark.slow
def test_half_precision_that_overflows_is_done_again_in_float32(model, pixels):
    content = torch.load(model, weights_only=True)
    content['params'] = {key: value * (1e4 if 'branches' in key else 1) for key, value in content['params'].items()}
    save_checkpoint(content, model)
    image = sr.load(model, patch_size=16, step=14, precision='float16').upscale(pixels).image
    assert np.array_equal(image, sr.load(model, patch_size=16, step=14).upscale(pixels).image)


@pytest.mark.parametrize('image,message', [
    (3, 'image: expected a path, a PIL image, an array .* but got int'),
    (np.zeros((4, 4), bool), 'image: expected an array of uint8, uint16 or float in .0, 1., but got bool'),
    (np.zeros((4, 4, 5), np.uint8), r'image: expected an array of shape .* but got \(4, 4, 5\)'),
    (np.zeros((0, 4, 3), np.uint8), r'image: expected an array of shape .* but got \(0, 4, 3\)'),
    (Image.new('F', (4, 4)), "image: expected a PIL image of 8 or 16 bits, but got mode 'F'"),
])
def test_what_is_no_image_is_refused(upscaler, image, message):
    with pytest.raises(sr.OptionError, match=message):
        upscaler.upscale(image)


def test_a_broken_file_is_refused(upscaler, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no picture')
    with pytest.raises(ImageError, match='a.png'):
        upscaler.upscale(tmp_path / 'a.png')


@pytest.mark.parametrize('setting,key,message', [
    (dict(budget=0), 'budget=0', 'expected a number above 0'),
    (dict(budget='half'), 'budget=half', 'expected a number above 0'),
    (dict(target_ms=float('nan')), 'target_ms=nan', 'expected a number above 0'),
    (dict(budget=1, target_ms=2), 'target_ms=2', 'cannot be combined with budget'),
    (dict(target_ms=1, max_loss=2), 'max_loss=2', 'cannot be combined with target_ms'),
    (dict(max_loss=-1), 'max_loss=-1', 'expected a number above 0'),
    (dict(cost='latency'), 'cost=latency', 'requires a budget'),
    (dict(cost='money', budget=1), 'cost', "accepted: None, macs, latency; got 'money'"),
    (dict(precision='int8'), 'precision', "accepted: float32, bfloat16, float16; got 'int8'"),
    (dict(backend='jax'), 'backend', "accepted: None, torch, onnxruntime, openvino; got 'jax'"),
    (dict(patch_size=4), 'patch_size=4', 'expected at least 8'),
    (dict(patch_size=16.5), 'patch_size=16.5', 'expected an integer of at least 1'),
    (dict(step=99), 'step=99', 'expected at most the patch size, 96'),
    (dict(device='toaster'), 'device=toaster', 'cannot be used'),
    (dict(model=None), 'model', 'a checkpoint is needed, its name, or an option file that names one'),
])
def test_a_setting_that_cannot_be_is_named(model, setting, key, message):
    with pytest.raises(sr.OptionError) as caught:
        sr.load(**{'model': model, **setting})
    assert caught.value.key == key and caught.value.message.startswith(message)


def test_a_budget_needs_a_network_that_routes(tmp_path):
    net_opt = carn(8)
    save_checkpoint({
        'params': build_network(net_opt).state_dict(),
        'network_g': net_opt,
        'scale': 4
    }, str(tmp_path / 'plain.pth'))
    with pytest.raises(sr.OptionError, match='budget=0.5: needs a network that routes, CDNSR or PCSR'):
        sr.load(tmp_path / 'plain.pth', budget=0.5)
    assert not sr.load(tmp_path / 'plain.pth').routed


def test_a_folder(upscaler, model, pixels, tmp_path):
    (tmp_path / 'in').mkdir()
    for name in 'ab':
        Image.fromarray(pixels).save(tmp_path / 'in' / f'{name}.png')
    done = upscaler.upscale_folder(tmp_path / 'in', tmp_path / 'out', map=True)
    assert done.done == 2 and not done.failed
    assert np.array_equal(read_image(tmp_path / 'out/b.png').pixels, expected(model, pixels))
    assert (tmp_path / 'out/a_map.png').is_file()
    for wrong, message in ((dict(ext='gif'), 'ext=gif: accepted: png'), (dict(suffix='a/b'), 'suffix=a/b: expected no'),
                           (dict(shard='3/2'), 'shard=3/2: expected I/N'), (dict(weigh='x'), "weigh")):
        with pytest.raises(sr.OptionError, match=message):
            upscaler.upscale_folder(tmp_path / 'in', tmp_path / 'out', **wrong)


def test_the_command_fills_the_same_settings_with_the_same_defaults():
    args = build_parser().parse_args(['upscale', '-m', 'a.pth', '-i', 'in', '-o', 'out'])
    assert settings_of(args) == Settings('a.pth')
    assert set(FLAGS) == {field.name for field in fields(Settings)} <= set(vars(args))


@pytest.mark.slow
def test_the_network_of_a_name(monkeypatch, tmp_path):
    """A name is found before anything else has been registered, in a process of its own."""
    net_opt = fsrcnn(8)
    folder = tmp_path / 'experiments/pretrained_models'
    folder.mkdir(parents=True)
    save_checkpoint({
        'params': build_network(net_opt).state_dict(),
        'network_g': net_opt,
        'scale': 4
    }, str(folder / 'tiny.pth'))
    monkeypatch.chdir(tmp_path)
    assert load_network('tiny') is not None
    code = 'import cdnsr_basicsr as sr; print(sr.load("tiny").scale)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == '4\n', done.stderr
