"""`basicsr upscale`: right pictures of every kind and size, one clear line for a mistake, and nothing lost."""
import cv2
import io
import logging
import numpy as np
import os
import png
import pytest
import re
import resource
import shutil
import signal
import subprocess
import sys
import tifffile
import torch
import yaml
from pathlib import Path
from PIL import Image
from torch import nn
from torch.nn import functional as F

from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.inference import TileUpscaler, image_io, tile_upscaler, upscale
from cdnsr_basicsr.inference.speed import Speed
from tests.helpers import carn, decode_by_pypng, documented, fsrcnn, spread, strict_json, turned


@ARCH_REGISTRY.register()
class SinglePixels(nn.Module):
    """Sees single pixels only, so that tiles and borders change nothing; exceeds [0, 1] a little."""

    def __init__(self, upscale=2, channels=3):
        super().__init__()
        self.upscale, self.channels = upscale, channels
        self.conv = nn.Conv2d(channels, channels * upscale**2, 1)
        weight = torch.rand(self.conv.weight.shape)
        brightness = torch.linspace(0.8, 1.2, len(weight)).view(-1, 1, 1, 1)
        self.conv.weight.data = brightness * weight / weight.sum(dim=1, keepdim=True)
        self.conv.bias.data.fill_(-0.1)

    def forward(self, x):
        return F.pixel_shuffle(self.conv(x), self.upscale)


@ARCH_REGISTRY.register()
class LargeFeatures(nn.Module):
    """Enlarges, by features that are `gain` times as large as the image."""

    def __init__(self, gain, upscale=2):
        super().__init__()
        self.upscale, self.gain = upscale, gain
        self.convs = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(4)))
        for i, conv in enumerate(self.convs):
            conv.weight.data = torch.eye(3).view(3, 3, 1, 1) * gain**(0.5 if i < 2 else -0.5)

    def forward(self, x):
        return self.convs(x).repeat_interleave(self.upscale, 2).repeat_interleave(self.upscale, 3)


def pixels_block(scale=2, channels=3):
    return dict(type='SinglePixels', upscale=scale, channels=channels)


def cdnsr_block(scale=2):
    branches = [dict(type='Interpolation', upscale=scale), pixels_block(scale), fsrcnn(4, scale)]
    return dict(type='CDNSR', upscale=scale, branches=branches, classifier=dict(type='PatchClassifier', num_feat=8))


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Networks by name, each with a checkpoint of that name in one folder."""
    folder, nets = tmp_path_factory.mktemp('models'), {}
    blocks = {f'cdnsr_x{scale}': cdnsr_block(scale) for scale in (2, 3, 4)}
    blocks.update(plain=pixels_block(), gray=pixels_block(channels=1), carn=carn(4, 2))
    blocks['mapped'] = dict(cdnsr_block(), classifier=dict(type='ErrorMap', num_feat=8))
    for name, block in blocks.items():
        torch.manual_seed(1)
        net = build_network(block).eval()
        if name.startswith('cdnsr'):
            spread(net).branches[2].deconv.bias.data.fill_(0.5)
        if name == 'mapped':  # says that the branches leave 1, 0.6 and 0.4 of what the texture tells
            torch.nn.init.zeros_(net.classifier.head.weight)
            net.classifier.head.bias.data = torch.tensor([0., 0.4, 0.6])
        save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=block['upscale']), folder / f'{name}.pth')
        nets[name] = net
    return folder, nets


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Runs `basicsr upscale` in an empty folder, by default from the folder 'in' to the folder 'out'."""
    monkeypatch.chdir(tmp_path)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    # a training in another test has set up BasicSR's logger, which would report every network
    monkeypatch.setattr(logging.getLogger('basicsr'), 'handlers', [])

    def run_(*arguments, model='cdnsr_x2', source='in', output='out'):
        arguments = [str(argument) for argument in arguments]
        for flag, value in (('-m', model and models[0] / f'{model}.pth'), ('-i', source), ('-o', output)):
            if value and flag not in arguments:
                arguments += [flag, str(value)]
        try:
            return cli.main(['upscale', *arguments])
        except SystemExit as error:  # as argparse ends
            return error.code

    return run_


def photo(height, width, channels=3, dtype='uint8', seed=0):
    """Waves and noise, brightest for seeds like 0, 4, 8; different in each channel, in 16 bits no multiple of 257."""
    y, x, c = np.mgrid[:height, :width, :channels]
    waves = 0.5 + 0.45 * np.sin((x + 2 * y) / 9 + c + seed) + np.random.default_rng(seed).normal(0, 0.05, x.shape)
    return ((1 - seed % 4 / 4) * waves.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)


def save(path, pixels):
    """Writes a picture by libraries that the command does not use for that."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = pixels.shape
    if path.suffix == '.png':
        writer = png.Writer(
            width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=8 * pixels.dtype.itemsize)
        with open(path, 'wb') as file:
            writer.write(file, pixels.reshape(height, -1).tolist())
    elif path.suffix in ('.tif', '.tiff'):
        tifffile.imwrite(
            path,
            pixels if channels > 1 else pixels[..., 0],
            photometric='rgb' if channels > 2 else 'minisblack',
            planarconfig='contig' if channels > 1 else None,
            extrasamples=['unassalpha'] if channels in (2, 4) else None)
    else:
        kept = {'lossless': True} if path.suffix == '.webp' else {}
        Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(path, **kept)
    return pixels


def load(path):
    """Pixels of a picture, of shape (h, w, c)."""
    if path.suffix == '.png':
        values, depth = decode_by_pypng(path)
        return values.astype('uint16' if depth == 16 else 'uint8')
    pixels = tifffile.imread(path) if path.suffix in ('.tif', '.tiff') else np.asarray(Image.open(path))
    return pixels.reshape(*pixels.shape[:2], -1)


def slow(net, pixels, kind=None):
    """The network on a whole picture that fits into one tile, in float32, plane by plane.

    Below 16 pixels a side it is reflected, and where there is nothing left to reflect, its last pixel is repeated.
    """
    white, (height, width, channels) = np.iinfo(pixels.dtype).max, pixels.shape
    colors = channels - (channels in (2, 4))
    results = []
    for plane in [pixels[..., :colors]] + [pixels[..., colors:]] * (colors < channels):
        missing = [max(0, 16 - height), max(0, 16 - width)]
        reflected = [min(missing[0], height - 1), min(missing[1], width - 1)]
        padded = np.pad(plane, [(0, reflected[0]), (0, reflected[1]), (0, 0)], 'reflect')
        padded = np.pad(padded, [(0, missing[0] - reflected[0]), (0, missing[1] - reflected[1]), (0, 0)], 'edge')
        x = torch.from_numpy(padded.astype(np.float32) / white).permute(2, 0, 1).unsqueeze(0)
        x = x.expand(-1, getattr(net, 'channels', 3), -1, -1)
        with torch.no_grad():
            if hasattr(net, 'branches'):
                chosen = int(net.classifier(x).argmax()) if kind is None else kind
                y = net.branches[chosen](x)
            else:
                y = net(x)
        y = y[0].permute(1, 2, 0).numpy()[:height * net.upscale, :width * net.upscale]
        if plane.shape[2] == 1 and y.shape[2] == 3:
            y = (0.299 * y[..., 0] + 0.587 * y[..., 1] + 0.114 * y[..., 2])[..., np.newaxis]
        results.append(np.rint(y * white).clip(0, white).astype(pixels.dtype))
    if colors < channels and (pixels[..., colors:] == pixels[0, 0, colors]).all():
        results[1][:] = pixels[0, 0, colors]
    return np.concatenate(results, axis=2)


def assert_same(actual, expected):
    """Equal, but for what rounds another way because sums are taken in another order."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.1


def written(folder='out'):
    """All files of a folder and its subfolders, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*') if path.is_file())


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# right pictures


@pytest.mark.slow
@pytest.mark.parametrize('model', ['cdnsr_x2', 'plain'])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_gray_rgb_and_alpha_equal_the_network_and_keep_their_depth(run, models, capsys, model, dtype):
    pictures = {
        f'{kind}{channels}.{kind}': save(f'in/{kind}{channels}.{kind}', photo(20, 33, channels, dtype, channels))
        for kind in ('png', 'tif')
        for channels in (1, 2, 3, 4)
    }
    assert run(model=model) == 0
    assert capsys.readouterr().out.startswith('Upscaled 8 images x2 to out: ')
    assert written() == sorted(pictures)
    for name, pixels in pictures.items():
        expected = slow(models[1][model], pixels)
        if name == 'png2.png' and dtype == 'uint16':  # which PNG has not here
            expected = expected[..., [0, 0, 0, 1]]
        assert_same(load(Path('out', name)), expected)


def test_all_branches_are_compared_with(models):
    for net in (models[1][f'cdnsr_x{scale}'] for scale in (2, 3, 4)):
        tiles = torch.stack([torch.from_numpy(photo(16, 16, seed=seed)).permute(2, 0, 1) / 255 for seed in range(4)])
        assert len(set(net.classifier(tiles).argmax(dim=1).tolist())) > 1


@pytest.mark.slow
def test_palettes_and_few_bits_become_colours_and_gray(run, models):
    Path('in').mkdir()
    picture = Image.fromarray(photo(20, 33)).quantize(13)
    picture.save('in/palette.png')
    picture.save('in/palette.bmp')
    picture.save('in/clear.png', transparency=3)
    Image.fromarray(photo(20, 33, 1)[..., 0]).convert('1').save('in/bits.png')
    os.rename('in/palette.bmp', 'in/bitmap.bmp')
    assert run() == 0
    indices, net = np.asarray(picture), models[1]['cdnsr_x2']
    colors = np.asarray(picture.convert('RGB'))
    assert_same(load(Path('out/palette.png')), slow(net, colors))
    assert_same(load(Path('out/bitmap.png')), slow(net, colors))
    alpha = np.where(indices == 3, 0, 255).astype(np.uint8)
    assert 0 < alpha.mean() < 255
    assert_same(load(Path('out/clear.png')), slow(net, np.dstack([colors, alpha])))
    bits = np.asarray(Image.open('in/bits.png').convert('L'))
    assert_same(load(Path('out/bits.png')), slow(net, bits[..., np.newaxis]))


@pytest.fixture
def large(tmp_path):
    """Checkpoint of a network of large features."""

    def make(gain):
        block = dict(type='LargeFeatures', gain=gain)
        weights = build_network(dict(block)).state_dict()
        save_checkpoint(dict(params=weights, network_g=block, scale=2), tmp_path / 'large.pth')
        return tmp_path / 'large.pth'

    return make


@pytest.mark.parametrize('kind', ['png', 'tif'])
def test_what_overflows_is_done_again_in_float32(run, large, caplog, kind):
    model = large(9e4)  # of what is brighter than 65504 / 9e4, 186 of 255
    dark, bright = photo(20, 33, 4) // 2, photo(20, 33, 4) // 4 + 190
    pictures = {'dark': dark, 'bright': bright, 'alpha': np.dstack([dark[..., :3], bright[..., 3]])}
    for name, pixels in pictures.items():
        save(f'in/{name}.{kind}', pixels)
    assert run('-m', model, '--precision', 'float16') == 0
    assert caplog.text.count('computed again in float32') == 1
    assert written() == sorted(f'{name}.{kind}' for name in pictures)
    for name, pixels in pictures.items():
        expected = pixels.repeat(2, 0).repeat(2, 1)
        assert np.abs(load(Path(f'out/{name}.{kind}')).astype(int) - expected).max() <= 1, name


def test_a_picture_of_what_is_no_number_is_never_written(run, large, capsys):
    save('in/black.png', np.zeros((20, 33, 3), np.uint8))
    save('in/white.tif', np.full((20, 33, 3), 255, np.uint8))
    save('in/alpha.png', np.dstack([np.zeros((20, 33, 3), np.uint8), photo(20, 33, 1)]))
    model = large(1e39)  # of black it makes black
    for precision in ('float32', 'bfloat16'):
        assert run('-m', model, '--precision', precision, '--overwrite') == 1
        assert written() == ['black.png'] and (load(Path('out/black.png')) == 0).all()
        reason = 'the network computes values for it that are not finite, even in float32'
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('Failed')]
        assert errors == [f'Failed: in/{name}: {reason}' for name in ('alpha.png', 'white.tif')]


@pytest.mark.slow
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_every_size_from_one_pixel_up(run, models, scale):
    sizes = [(1, 1), (1, 2), (2, 1), (1, 40), (3, 5), (15, 17), (16, 16), (40, 7), (64, 64)]
    pictures = {f'{h}_{w}.png': save(f'in/{h}_{w}.png', photo(h, w, seed=h)) for h, w in sizes}
    assert run(model=f'cdnsr_x{scale}') == 0
    assert written() == sorted(pictures)
    for name, pixels in pictures.items():
        assert_same(load(Path('out', name)), slow(models[1][f'cdnsr_x{scale}'], pixels))


@pytest.mark.parametrize('arguments', [(), ('--patch-size', 16), ('--patch-size', 16, '--step', 9), ('--step', 64)])
def test_tiles_cannot_be_seen(run, models, arguments):
    pictures = {f'{h}_{w}.png': save(f'in/{h}_{w}.png', photo(h, w, 4)) for h, w in [(3, 300), (130, 70), (200, 1)]}
    assert run(*arguments, model='plain') == 0
    for name, pixels in pictures.items():
        assert_same(load(Path('out', name)), slow(models[1]['plain'], pixels))


def test_alpha_that_is_the_same_everywhere_stays_so_exactly(run):
    for level in (0, 1, 77, 255):
        pixels = photo(20, 20, 4)
        pixels[..., 3] = level
        save(f'in/{level}.png', pixels)
    pixels = photo(9, 9, 2, 'uint16')
    pixels[..., 1] = 12345
    save('in/gray.tif', pixels)
    assert run() == 0
    for level in (0, 1, 77, 255):
        assert (load(Path(f'out/{level}.png'))[..., 3] == level).all()
    assert (load(Path('out/gray.tif'))[..., 1] == 12345).all()


def test_exif_orientation_is_honoured_once(run, models):
    Path('in').mkdir()
    pixels = photo(20, 33)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(f'in/{orientation}.png', exif=exif)
        Image.fromarray(pixels).save(f'in/{orientation}j.jpg', exif=exif, quality=97)
    assert run(model='plain') == 0
    for orientation in range(1, 9):
        expected = slow(models[1]['plain'], turned(pixels, orientation))
        assert_same(load(Path(f'out/{orientation}.png')), expected)
        near = load(Path(f'out/{orientation}j.png'))
        assert near.shape == expected.shape and np.abs(near.astype(int) - expected).mean() < 12
        for name in (f'{orientation}.png', f'{orientation}j.png'):
            assert Image.open(f'out/{name}').getexif().get(274, 1) == 1


@pytest.mark.slow
def test_all_of_pngsuite(run, models, shared, capfd):
    folder = shared('data/pngsuite')
    assert run(source=folder) == 1
    output, errors = capfd.readouterr()
    broken = {path.name for path in folder.glob('x*.png')}
    valid = {path.name for path in folder.glob('*.png')} - broken
    assert set(written()) == valid and len(valid) > 150
    assert {Path(path).name for path in re.findall('^Failed: (.*?): ', errors, re.M)} == broken
    assert f'Upscaled {len(valid)} images' in output and 'Traceback' not in errors
    for name in sorted(valid):
        pixels, depth = decode_by_pypng(folder / name)
        pixels = pixels.astype('uint16' if depth == 16 else 'uint8')
        result = load(Path('out', name))
        if pixels.shape[2] == 2 and depth == 16:
            pixels = pixels[..., [0, 0, 0, 1]]
        assert result.dtype == pixels.dtype, name
        assert result.shape == (2 * pixels.shape[0], 2 * pixels.shape[1], pixels.shape[2]), name
        if max(pixels.shape) <= 64 and not (pixels.shape[2] == 4 and depth == 16):
            assert_same(result, slow(models[1]['cdnsr_x2'], pixels))


# R, G and B from 0 to 1 to the Y, Cb and Cr of 8 bits that networks are trained on (ITU-R BT.601)
YCBCR = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.], [112., -93.786, -18.214]])


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_gray_networks_make_the_luma_and_leave_the_colours(run, models, dtype):
    """Y, Cb and Cr by their definition; gray has luma alone."""
    pictures = {f'{n}.{kind}': photo(70, 33, n, dtype, n) for n in (1, 2, 3, 4) for kind in ('png', 'tif')}
    pictures['equal.png'] = photo(20, 33, 1, dtype)[..., [0, 0, 0]]
    pictures['equal.tif'] = photo(20, 33, 4, dtype)[..., [0, 0, 0, 3]]
    pictures['small.png'] = photo(1, 2, 3, dtype)
    white, net = np.iinfo(dtype).max, models[1]['gray']

    def upscaled(plane):
        """Full-range gray as the network makes it of studio range."""
        luma = torch.from_numpy(np.asarray((16 + 219 * plane) / 255, np.float32))
        with torch.no_grad():
            return (255 * net(luma[None, None])[0, 0].double().numpy() - 16) / 219

    for name, pixels in pictures.items():
        save(f'in/{name}', pixels)
        values = pixels / white
        if pixels.shape[2] < 3:
            expected = np.stack([upscaled(values[..., i]) for i in range(pixels.shape[2])], axis=2)
        else:
            y, cb, cr = np.moveaxis(values[..., :3] @ YCBCR.T, 2, 0)
            chroma = torch.from_numpy(np.stack([cb, cr]))[None]
            chroma = F.interpolate(chroma, scale_factor=2, mode='bicubic', align_corners=False)[0].numpy()
            result = np.stack([219 * upscaled(y / 219), *chroma], axis=2) @ np.linalg.inv(YCBCR).T
            expected = np.dstack([result, *(upscaled(values[..., i]) for i in range(3, pixels.shape[2]))])
        pictures[name] = np.rint(expected * white).clip(0, white).astype(dtype)
    assert run('--patch-size', 16, model='gray') == 0
    assert written() == sorted(pictures)
    for name, expected in pictures.items():
        if name == '2.png' and dtype == 'uint16':  # which PNG has not here
            expected = expected[..., [0, 0, 0, 1]]
        result = load(Path('out', name))
        assert_same(result, expected)
        assert 'equal' not in name or (result[..., :1] == result[..., 1:3]).all()


def test_gray_networks_that_route_pixels_have_any_scale(run, models, tmp_path):
    """A network of zeros leaves PCSR's bilinear part."""
    block = dict(type='PCSR', upscale=2, backbone=dict(fsrcnn(4, 2), num_in_ch=1, num_out_ch=1))
    net = build_network(block)
    for value in net.parameters():
        value.data.zero_()
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=2), tmp_path / 'pcsr.pth')
    pixels = save('in/a.png', photo(40, 30))
    assert run('-m', tmp_path / 'pcsr.pth', '--scale', 2.5) == 0
    image = torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]
    size = dict(size=(100, 75), align_corners=False)
    cubic, linear = (
        F.interpolate(image, mode=mode, **size)[0].permute(1, 2, 0).numpy() for mode in ('bicubic', 'bilinear'))
    luma = [(image @ [0.299, 0.587, 0.114])[..., np.newaxis] for image in (cubic, linear)]
    expected = cubic - luma[0] + luma[1]
    assert_same(load(Path('out/a.png')), np.rint(expected * 255).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize('precision,tolerance', [('float32', 1), ('bfloat16', 8), ('float16', 2)])
def test_precision(run, models, precision, tolerance):
    pixels = save('in/a.png', photo(20, 33))
    assert run('--precision', precision, '--budget', 9, '--cost', 'macs') == 0
    difference = load(Path('out/a.png')).astype(int) - slow(models[1]['cdnsr_x2'], pixels, kind=2)
    assert np.abs(difference).max() <= tolerance


# formats


@pytest.mark.slow
def test_formats(run, models):
    pixels = {}
    for name in ('a.png', 'b.jpg', 'c.jpeg', 'd.webp', 'e.bmp', 'f.tif', 'g.tiff', 'H.PNG'):
        save(Path('in', name.lower()), photo(20, 33))
        os.rename(Path('in', name.lower()), Path('in', name))
        pixels[name] = np.asarray(Image.open(Path('in', name)))
    assert run(model='plain') == 0
    assert written() == ['H.png', 'a.png', 'b.png', 'c.png', 'd.png', 'e.png', 'f.tif', 'g.tiff']
    for name, values in pixels.items():
        result = Path('out', name if '.tif' in name else f'{name[0]}.png')
        assert_same(load(result), slow(models[1]['plain'], values))
    for given, kind in (('png', 'PNG'), ('.JPG', 'JPEG'), ('jpeg', 'JPEG'), ('webp', 'WEBP'), ('TIFF', 'TIFF')):
        assert run(
            '--ext', given, '--suffix', '_x2', '--budget', 0.01, '--cost', 'macs', source='in/a.png', output='o2') == 0
        path = Path('o2', f'a_x2.{given.lower().strip(".")}')
        assert Image.open(path).format == kind
        near = load(path).astype(int) - slow(models[1]['cdnsr_x2'], pixels['a.png'], kind=0)
        assert near.shape == (40, 66, 3) and np.abs(near).mean() < 8
    assert len(written('o2')) == 5


@pytest.mark.slow
def test_what_a_format_cannot_hold_is_named_and_the_others_are_done(run, capsys):
    for name, channels, dtype in (('deep', 3, 'uint16'), ('good', 3, 'uint8'), ('clear', 4, 'uint8')):
        save(f'in/{name}.png', photo(20, 33, channels, dtype))
    assert run('--ext', 'jpg') == 1
    assert written() == ['good.jpg']
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith('Failed: in/clear.png: ') and errors[0].endswith('use .png, .webp or .tif')
    assert errors[1].startswith('Failed: in/deep.png: ') and errors[1].endswith('use .png or .tif')
    assert run('--ext', 'webp', output='webp') == 1
    assert written('webp') == ['clear.webp', 'good.webp']
    assert load(Path('webp/clear.webp')).shape == (40, 66, 4)


def test_what_is_too_large_for_png_becomes_tiff(run, capsys, monkeypatch):
    save('in/a.png', photo(40, 40))
    save('in/b.png', photo(20, 20))
    monkeypatch.setattr(image_io, 'MAX_PIXELS_IN_MEMORY', 5000)
    assert run(model='plain') == 0
    assert written() == ['a.tif', 'b.png'] and load(Path('out/a.tif')).shape == (80, 80, 3)
    kept = Path('out/a.tif').read_bytes()
    assert run(model='plain') == 0
    assert 'Skipped, already exist: 2' in capsys.readouterr().out
    assert Path('out/a.tif').read_bytes() == kept and written() == ['a.tif', 'b.png']
    # that name belongs to another picture
    save('in/a.tif', photo(10, 10))
    assert run('--overwrite', model='plain') == 1
    assert 'Failed: in/a.png: out/a.png: 80x80 is too large' in one_line(capsys)
    assert load(Path('out/a.tif')).shape == (20, 20, 3)


# folders


def test_a_folder_with_subfolders_and_junk(run, capsys):
    for name in ('a.png', 'sub/a.png', 'sub/deeper/b.png', '.hidden/a.png', 'sub/.c.png'):
        save(Path('in', name), photo(9, 9))
    Path('in/readme.txt').write_text('text')
    Path('in/junk.png').write_text('no picture')
    Path('in/empty.jpg').write_text('')
    Path('in/cut.png').write_bytes(Path('in/a.png').read_bytes()[:60])
    Path('in/lost.png').symlink_to('nowhere.png')
    Path('in/folder.png').mkdir()
    os.mkfifo('in/pipe.png')
    assert run('--map', '--suffix', '_big') == 1
    names = ['a_big', 'sub/a_big', 'sub/deeper/b_big']
    assert written() == sorted(f'{name}{kind}.png' for name in names for kind in ('', '_map'))
    output, errors = capsys.readouterr()
    assert output.startswith('Upscaled 3 images x2 to out: ')
    failed = re.findall(r'^Failed: in/(.*?)\.(?:png|jpg): .*; accepted: .*$', errors, re.M)
    assert failed == ['cut', 'empty', 'junk', 'lost', 'pipe'] and len(errors.splitlines()) == 5


def test_what_is_not_done_of_a_folder_is_named(run, models, capsys):
    """Further frames and pages, files of other endings, and what needs another package or another program."""
    pixels = save('in/a.png', photo(20, 33))
    frames = [Image.fromarray(photo(20, 33, seed=seed)) for seed in range(3)]
    for name in ('frames.png', 'frames.gif', 'pages.tif'):
        frames[0].save(f'in/{name}', save_all=True, append_images=frames[1:])
    os.rename('in/frames.gif', 'in/g.gif')
    for name in ('b.jfif', 'c.avif', 'd.jp2'):
        frames[0].save(f'in/{name}', format={'b': 'JPEG', 'c': 'AVIF', 'd': 'JPEG2000'}[name[0]])
    cv2.imwrite('in/e.hdr', np.linspace(0, 10, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3))
    for name in ('notes.txt', 'sub/more.txt', 'Thumbs.db', 'none'):
        Path('in', name).parent.mkdir(exist_ok=True)
        Path('in', name).write_text('no picture')
    assert run(model='plain') == 1
    assert written() == ['a.png', 'b.png', 'c.png', 'd.png', 'frames.png', 'g.png', 'pages.tif']
    assert_same(load(Path('out/a.png')), slow(models[1]['plain'], pixels))
    output, errors = capsys.readouterr()
    assert output.splitlines()[1:] == [
        'Read in part: in/frames.png: only the first of 3 frames.',
        'Read in part: in/g.gif: only the first of 3 frames.', 'Read in part: in/pages.tif: only the first of 3 pages.',
        'Skipped, not an image format: .db: Thumbs.db', 'Skipped, not an image format: .txt: notes.txt, sub/more.txt',
        'Skipped, not an image format: no extension: none'
    ]
    assert errors.startswith('Failed: in/e.hdr: contains HDR values') and len(errors.splitlines()) == 1
    assert run('--shard', '2/2', output='second', model='plain') in (0, 1)  # said once, by the first part
    assert 'not an image format' not in capsys.readouterr().out


def test_a_picture_that_crashes_decoders_does_not_stop_the_others(run, models, capsys, shared):
    pictures = {f'{name}.png': save(f'in/{name}.png', photo(20, 33)) for name in ('a', 'z')}
    for name in ('apng_fdat0_segfault.png', 'apng_segfault_11.png', 'prepare_segfault_zune_1.png',
                 'b10_tif_zerocount.tif', 'b04c_jpgprog20000.jpg', 'b03b_iccp_small_bomb.png',
                 'b11b_tif_manystrips_deflate.tif'):
        shutil.copy(shared(f'cases/{name}'), 'in')
    assert run(model='plain') == 1
    assert written() == sorted(pictures)
    assert len(capsys.readouterr().err.splitlines()) == 7
    for name, pixels in pictures.items():
        assert_same(load(Path('out', name)), slow(models[1]['plain'], pixels))


def test_linked_folders_are_done_but_results_behind_links_are_not(run, capsys):
    for name in ('in/a.png', 'elsewhere/b.png', 'out/old.png'):
        save(name, photo(9, 9))
    Path('in/more').symlink_to('../elsewhere')
    Path('in/results').symlink_to('../out')
    Path('elsewhere/back').symlink_to('../in')
    assert run() == 0
    assert written() == ['a.png', 'more/b.png', 'old.png']


def test_the_limit_of_megapixels(run, capsys):
    save('in/a.png', photo(9, 9))
    Image.new('L', (1000, 1001)).save('in/b.png')
    assert run('--max-megapixels', 1) == 1
    assert written() == ['a.png']
    assert one_line(capsys).startswith('Failed: in/b.png: 1000x1001 is larger than 1 megapixels, the limit')
    assert run('--max-megapixels', 0) == 2
    assert 'argument --max-megapixels: expected an integer of at least 1' in one_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize('extension', ['png', 'jpg', 'webp', 'tif'])
def test_metadata_are_kept_unless_told(run, extension):
    exif = Image.Exif()
    exif[271], exif[274], exif[33432] = 'Camera', 6, 'me'
    exif.get_ifd(34665).update({36867: '2024:01:02 03:04:05', 40962: 33, 40963: 20})
    exif.get_ifd(34853).update({1: 'N', 2: (47., 30., 12.)})
    Path('in').mkdir()
    xmp = b'<x:xmpmeta tiff:Orientation="6" xmlns:x="adobe:ns:meta/"/>'
    Image.fromarray(photo(20, 33)).save('in/a.jpg', exif=exif, xmp=xmp, icc_profile=b'profile' * 30)
    assert run('--ext', extension) == 0
    assert run('--ext', extension, '--strip-metadata', output='bare') == 0
    with Image.open(f'out/a.{extension}') as kept:
        found, size = kept.getexif(), kept.size
        assert size == (40, 66) and found[271] == 'Camera' and found[274] == 1 and found[33432] == 'me'
        assert found.get_ifd(34665) == {36867: '2024:01:02 03:04:05', 40962: 40, 40963: 66}
        assert found.get_ifd(34853) == {1: 'N', 2: (47., 30., 12.)}
        assert kept.info['icc_profile'] == b'profile' * 30
    assert b'tiff:Orientation="1"' in Path(f'out/a.{extension}').read_bytes()
    with Image.open(f'bare/a.{extension}') as bare:
        assert bare.size == size and not set(bare.getexif()) & {271, 33432, 34665, 34853}
        assert bare.info['icc_profile'] == b'profile' * 30
    assert b'xmpmeta' not in Path(f'bare/a.{extension}').read_bytes()


def test_names_in_any_encoding(run):
    name = b'\xe9t\xe9.png'  # latin-1
    save('in/a.png', photo(9, 9))
    try:
        os.rename('in/a.png', b'in/' + name)
    except OSError:
        pytest.skip('not on this file system')
    save('in/\u5199\u771f 1.png', photo(9, 9))
    assert run() == 0
    assert sorted(os.listdir(b'out')) == sorted([name, '\u5199\u771f 1.png'.encode()])


def test_of_two_pictures_with_one_result_the_first_is_done(run, models, capsys):
    for name in ('a.png', 'b.tif', 'b.webp', 'c.tif', 'c.tiff', 'd.png'):
        save(Path('in', name), photo(9, 9))
    first = save('in/a.bmp', photo(9, 9, seed=5))
    error = 'Failed: in/a.png: its result would be out/a.png, as that of a.bmp; rename one of them'
    assert run('--shard', '2/2', model='plain') == 1  # also if the first one's turn has not come yet
    assert one_line(capsys) == error
    assert run('--shard', '1/2', model='plain') == 0
    assert written() == ['a.png', 'b.png', 'b.tif', 'c.tif', 'c.tiff', 'd.png']
    assert_same(load(Path('out/a.png')), slow(models[1]['plain'], first))
    assert run(model='plain') == 1
    output, errors = capsys.readouterr()
    assert 'Upscaled 0 images' in output and 'already exist: 6' in output and errors == f'{error}\n'


@pytest.mark.slow
def test_a_map_replaces_no_result(run, capsys):
    for name in ('a.png', 'a_map.png', 'a.tif'):
        save(Path('in', name), photo(9, 9))
    assert run('--map') == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        'Failed: in/a.tif: its result would be out/a_map.png, as that of a.png; rename one of them',
        'Failed: in/a_map.png: its result would be out/a_map.png, as that of a.png; rename one of them'
    ]
    assert written() == ['a.png', 'a_map.png'] and load(Path('out/a.png')).shape == (18, 18, 3)
    assert run() == 0  # without maps only a_map.png has a result there
    assert 'already exist: 2' in capsys.readouterr().out and written() == ['a.png', 'a.tif', 'a_map.png']


@pytest.mark.parametrize('count', [1, 2, 3, 10])
def test_shards_part_a_folder_exactly(run, count):
    names = sorted(f'{name}.png' for name in ('a', 'b', 'sub/a', 'sub/c', 'z', '1', '10'))
    for name in names:
        save(Path('in', name), photo(3, 3))
    parts = []
    for part in range(1, count + 1):
        assert run('--shard', f'{part}/{count}', output=f'out{part}', model='plain') == 0
        parts += written(f'out{part}')
        assert abs(len(written(f'out{part}')) - len(names) / count) < 1
    assert sorted(parts) == names


@pytest.mark.slow
def test_shards_beside_each_other_see_the_same_folder(run):
    for name in 'abcde':
        save(f'in/{name}.jpg', photo(3, 3))
    for output, suffix in (('in', '_x2'), ('in/results', '')):
        for part in (1, 2, 3):
            assert run('--shard', f'{part}/3', '--suffix', suffix, '--map', output=output) == 0
        assert len(written(output)) == (15 if suffix else 10)
        for name in Path(output).glob('*.png'):
            name.unlink()


@pytest.mark.slow
def test_processes_of_torchrun_take_a_part_each(run, monkeypatch, capsys):
    for name in 'abcde':
        save(f'in/{name}.png', photo(3, 3))
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank, names in (('0', 'ace'), ('1', 'bd')):
        monkeypatch.setenv('RANK', rank)
        assert run(output=f'out{rank}') == 0
        assert written(f'out{rank}') == [f'{name}.png' for name in names]
    assert run('--shard', '1/5') == 0
    assert written() == ['a.png']
    capsys.readouterr()
    for rank, size in (('2', '2'), ('x', '2'), ('0', 'x'), ('-1', '2'), ('0', '0')):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', size)
        assert run(output='none') == 2
        assert one_line(capsys).startswith(f'basicsr: error: RANK {rank}, WORLD_SIZE {size}: ')
    monkeypatch.delenv('WORLD_SIZE')
    monkeypatch.setenv('RANK', '1')  # not torchrun's
    assert run(output='all') == 0
    assert len(written('all')) == 5 and not Path('none').exists()


# results that are there


@pytest.mark.slow
def test_a_result_is_replaced_only_if_asked_for(run, models, capsys):
    first, second = save('in/a.png', photo(9, 9)), save('in/b.png', photo(9, 9, seed=1))
    Path('out').mkdir()
    Path('out/a.png').write_text('mine')
    Path('out/.77.b.png').write_text('what a killed run left')
    assert run() == 0
    output = capsys.readouterr().out
    assert output.startswith('Upscaled 1 image x2') and 'Skipped, already exist: 1 (--overwrite' in output
    assert Path('out/a.png').read_text() == 'mine'
    assert_same(load(Path('out/b.png')), slow(models[1]['cdnsr_x2'], second))
    assert run('--overwrite') == 0
    assert_same(load(Path('out/a.png')), slow(models[1]['cdnsr_x2'], first))
    assert 'already exist' not in capsys.readouterr().out
    kept = Path('out/a.png').read_bytes()
    Path('in/a.png').write_text('broken by now')
    assert run('--overwrite') == 1
    assert Path('out/a.png').read_bytes() == kept
    assert written() == ['.77.b.png', 'a.png', 'b.png']


@pytest.mark.slow
@pytest.mark.parametrize('overwrite', [(), ('--overwrite', )])
def test_pictures_are_not_replaced_by_their_results(run, capsys, overwrite):
    save('in/a.png', photo(9, 9))
    save('in/b.jpg', photo(9, 9))
    Path('link').symlink_to('in')
    before = {name: Path('in', name).read_bytes() for name in written('in')}
    for source, output in (('in', 'in'), ('in', 'link'), ('in/a.png', 'in'), ('in/a.png', 'link'), ('in', './in/')):
        assert run(*overwrite, source=source, output=output) == 2
        assert one_line(capsys).startswith(f'basicsr: error: {output}: the results would replace the images; use ')
    assert {name: Path('in', name).read_bytes() for name in written('in')} == before
    assert run(*overwrite, source='in/b.jpg', output='in') == 0
    assert written('in') == ['a.png', 'b.jpg', 'b.png']


@pytest.mark.slow
@pytest.mark.parametrize('output,suffix', [('in', '_x2'), ('in/out', ''), ('in/out', '_x2')])
def test_results_beside_the_pictures_are_not_upscaled_again(run, capsys, output, suffix):
    for name in ('a.png', 'b.jpg', 'sub/a.png'):
        save(Path('in', name), photo(9, 9))
    assert run('--suffix', suffix, '--map', output=output) == 0
    first = written('in')
    assert len(first) == 9
    for source in ('in', Path('in').resolve()):
        assert run('--suffix', suffix, output=output, source=source) == 0
        assert 'Upscaled 0 images' in capsys.readouterr().out and written('in') == first


def signalled_in_the_middle(models, number):
    """What `upscale` does that gets a signal after three strips of the result have been computed."""
    program = '''
import os, sys
from cdnsr_basicsr import cli
from cdnsr_basicsr.inference import image_io, pictures, tile_upscaler
from tests.test_cli import test_upscale  # SinglePixels
tile_upscaler.CANVAS_BYTES['cpu'] = image_io.TILE = 32
tile_upscaler.MERGED_SIDE = 16  # of rows of tiles that are merged, two
to_arrays, signal = pictures.to_arrays, int(sys.argv.pop())

def signalled(*args, **kwargs):
    for number, strip in enumerate(to_arrays(*args, **kwargs)):
        if number == 3:
            assert os.listdir('out')
            os.kill(os.getpid(), signal)
        yield strip

pictures.to_arrays = signalled
cli.main(sys.argv[1:])
'''
    model, root = models[0] / 'plain.pth', Path(__file__).resolve().parents[2]
    arguments = ['-m', str(model), '-i', 'in', '-o', 'out', '--patch-size', '16', '--ext', 'tif', str(int(number))]
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    command = [sys.executable, '-c', program, 'upscale', *arguments]
    return subprocess.run(command, env={**os.environ, 'PYTHONPATH': path}).returncode


@pytest.mark.slow
def test_a_killed_run_leaves_no_result_and_the_next_one_works(run, models):
    pixels = save('in/a.png', photo(120, 50))
    assert signalled_in_the_middle(models, signal.SIGKILL) == -signal.SIGKILL
    left = written()
    assert len(left) == 1 and left[0].startswith('.') and Path('out', left[0]).stat().st_size > 0
    assert run('--ext', 'tif', model='plain') == 0
    assert written() == sorted(left + ['a.tif'])
    assert_same(load(Path('out/a.tif')), slow(models[1]['plain'], pixels))
    assert run(source='out', output='next', model='plain') == 0
    assert written('next') == ['a.tif']


@pytest.mark.slow
def test_a_terminated_run_leaves_nothing(run, models):
    save('in/a.png', photo(120, 50))
    assert signalled_in_the_middle(models, signal.SIGTERM) == 128 + signal.SIGTERM
    assert written() == []


def test_the_longest_names(run, models):
    name = '\u6f22' * 83 + 'ab'  # 251 bytes, of 255 with the suffix
    pixels = save(f'in/{name}.png', photo(5, 4))
    assert run(model='plain') == 0 and written() == [f'{name}.png']
    assert_same(load(Path('out', f'{name}.png')), slow(models[1]['plain'], pixels))


@pytest.mark.parametrize('extension', ['png', 'tif', 'jpg', 'webp'])
def test_a_full_disk(run, capfd, extension):
    save('in/a.png', np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8))
    save('in/b.png', photo(2, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, limits[1]))
    try:
        code = run('--ext', extension, model='plain')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and written() == [f'b.{extension}']
    error = capfd.readouterr().err.splitlines()[-1]  # libpng has its own line before
    assert error.startswith('Failed: in/a.png: ') and ('File too large' in error or 'is the disk full?' in error)


@pytest.mark.parametrize('error', [RuntimeError('of a size that\nit cannot do'), torch.OutOfMemoryError('no memory')])
def test_a_picture_on_which_the_network_fails_does_not_stop_the_others(run, capsys, monkeypatch, error):
    for name, width in (('a', 20), ('b', 40), ('c', 20)):
        save(f'in/{name}.png', photo(20, width))
    original = TileUpscaler.run

    def fail(self, branch, tiles):
        if tiles.shape[3] == 40:
            raise error
        return original(self, branch, tiles)

    monkeypatch.setattr(TileUpscaler, 'run', fail)
    assert run('--map') == 1
    assert capsys.readouterr().err.splitlines()[-1] == f'Failed: in/b.png: {" ".join(str(error).split())}'
    assert written() == ['a.png', 'a_map.png', 'c.png', 'c_map.png']


# what is said to people and to programs


def test_json_says_what_the_text_says(run, capfd):
    for i in range(3):
        save(f'in/{i}.png', photo(30 + i, 40, seed=i))
    frames = [Image.fromarray(photo(20, 33, seed=seed)) for seed in range(2)]
    frames[0].save('in/frames.gif', save_all=True, append_images=frames[1:])
    Path('in/broken.png').write_text('no picture')
    Path('in/notes.txt').write_text('no picture')
    for output in ('plain', 'json'):
        save(f'{output}/0.png', photo(2, 2))
    assert run(output='plain') == 1
    plain, plain_errors = capfd.readouterr()
    assert run('--json', output='json') == 1
    output, errors = capfd.readouterr()
    content = strict_json(output)
    assert set(content) == documented('upscale')
    assert (content['output'], content['scale'], content['done'], content['present']) == ('json', 2, 3, 1)
    assert plain.startswith(f'Upscaled 3 images x2 to plain: {content["megapixels"]:.1f} megapixels in ')
    assert content['megapixels'] == 4 * (31 * 40 + 32 * 40 + 20 * 33) / 1e6 and content['seconds'] > 0
    shares = ' / '.join(f'{share:.0f}' for share in content['shares'])
    assert f'Tiles of class 0 to 2: {shares} %; cost {content["cost"]:.3f} of' in plain and content['unit'] == 'tiles'
    assert content['shares'] == [100 * count / sum(content['counts']) for count in content['counts']]
    assert content['notes'] == [dict(path='in/frames.gif', note='only the first of 2 frames')]
    assert content['left_out'] == ['in/notes.txt']
    assert [failure['path'] for failure in content['failed']] == ['in/broken.png']
    assert plain_errors == f'Failed: in/broken.png: {content["failed"][0]["reason"]}\n'
    notes = [line for line in plain.splitlines() if line.startswith(('Read in part: ', 'Skipped, not an image format'))]
    assert len(notes) == 2 and errors.splitlines() == [*notes, *plain_errors.splitlines()]


def test_json_of_a_network_without_classes(run, capfd):
    save('in/a.png', photo(20, 33))
    assert run('--json', model='plain') == 0
    content = strict_json(capfd.readouterr().out)
    assert content['done'] == 1 and content['cost'] is content['unit'] is None
    assert content['counts'] == content['shares'] == []
    assert run('--json') == 0  # of one with classes, but nothing to do
    content = strict_json(capfd.readouterr().out)
    assert (content['done'], content['present'], content['cost'], content['shares']) == (0, 1, None, [])


class Terminal(io.StringIO):
    """Standard error of 80 columns, as far as tqdm asks."""

    def isatty(self):
        return True


@pytest.mark.parametrize('model', ['cdnsr_x2', 'plain'])
def test_a_terminal_shows_speed_time_left_and_shares(run, capsys, monkeypatch, model):
    for i in range(3):
        save(f'in/{i}.png', photo(20, 30 + i, seed=i))
    terminal = Terminal()
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setenv('LINES', '24')
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', terminal)
        assert run(model=model) == 0
    output, errors = capsys.readouterr()
    last = re.split(r'[\r\n]+', terminal.getvalue().strip())[-1]
    shares = re.search('class 0 to 2: (.*) %;', output)
    said = f', tiles {shares[1].replace(" ", "")} %' if shares else ''
    assert (model == 'plain') == (not said)
    assert re.fullmatch(r'upscale: 100%\|.*\| 3/3 \[\d\d:\d\d<00:00, \d+\.\d\d megapixels/s' + said + r'\]', last), last
    assert errors == '' and run('--overwrite', model=model) == 0 and capsys.readouterr().err == ''


# budgets and maps


@pytest.mark.slow
@pytest.mark.parametrize('arguments,kind', [(('--budget', 0.01, '--cost', 'macs'), 0),
                                            (('--budget', 9, '--cost', 'macs'), 2), (('--target-ms', 1e-6), 0),
                                            (('--target-ms', 1e9), 2), (('--budget', 9, '--cost', 'latency'), 2)])
def test_both_ends_of_a_budget(run, models, capsys, monkeypatch, arguments, kind):
    monkeypatch.setattr(tile_upscaler, 'measured_speed', lambda *args: Speed([1] * 4, [1., 2., 3., 0.1]))
    pictures = {f'{i}.png': save(f'in/{i}.png', photo(30, 40, seed=i)) for i in range(3)}
    assert run(*arguments) == 0
    shares = ' / '.join('100' if i == kind else '0' for i in range(3))
    assert f'Tiles of class 0 to 2: {shares} %; cost ' in capsys.readouterr().out
    for name, pixels in pictures.items():
        assert_same(load(Path('out', name)), slow(models[1]['cdnsr_x2'], pixels, kind))


def cost_of(capsys):
    return float(re.search(r'cost ([\d.]+)', capsys.readouterr().out).group(1))


def test_a_budget_is_of_the_folder_where_errors_are_predicted(run, capsys):
    """However it is done: at once, in parts, or what is missing of it."""
    names = ('a', 'b', 'c')
    for name, height, strength in zip(names, (70, 90, 50), (0.1, 1, 0.4)):
        pixels = photo(height, 100).astype(float)
        save(f'in/{name}.png', (128 + strength * (pixels - 128)).astype('uint8'))
    arguments = ('--budget', 0.6, '--cost', 'macs', '--patch-size', 16)
    assert run(*arguments, model='mapped', output='opaque') == 0
    assert 0.58 < cost_of(capsys) <= 0.6
    save('in/alpha.png', photo(60, 60, 4))
    Path('in/broken.png').write_bytes(Path('in/a.png').read_bytes()[:300])
    assert run(*arguments, model='mapped') == 1
    assert run(*arguments, '--shard', '1/2', model='mapped', output='parts') in (0, 1)
    Path('parts/c.png').unlink(missing_ok=True)
    assert run(*arguments, model='mapped', output='parts') == 1
    for name in (*names, 'alpha'):
        assert_same(load(Path('parts', f'{name}.png')), load(Path('out', f'{name}.png')))
    capsys.readouterr()

    costs = {}
    for name in names:
        assert run(*arguments, model='mapped', source=f'in/{name}.png', output=f'alone_{name}') == 0
        costs[name] = cost_of(capsys)
        assert costs[name] <= 0.6
    Path('in/broken.png').unlink()
    assert run(*arguments, '--per-picture', model='mapped', output='each') == 0
    differ = 0
    for name in names:
        assert_same(load(Path('each', f'{name}.png')), load(Path(f'alone_{name}', f'{name}.png')))
        differ += not np.array_equal(load(Path('each', f'{name}.png')), load(Path('out', f'{name}.png')))
    assert differ >= 2
    assert run(*arguments, '--weigh', 'pictures', model='mapped', output='weighed') == 0
    assert not np.array_equal(load(Path('weighed/b.png')), load(Path('out/b.png')))


def test_a_loss_is_kept_as_cheaply_as_it_can_be(run, capsys):
    save('in/a.png', photo(90, 120))
    save('in/b.png', photo(60, 70, seed=1))
    costs = []
    for loss in (1e-6, 0.1, 0.5, 9):
        assert run('--max-loss', loss, '--patch-size', 16, '--overwrite', model='mapped') == 0
        costs.append(cost_of(capsys))
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[1] > costs[2] > costs[3]
    assert run('--max-loss', 0.1) == 2
    assert one_line(capsys).endswith('.pth: --max-loss 0.1 needs a classifier that predicts errors, ErrorMap or '
                                     'ErrorPredictor')


@pytest.mark.slow
def test_a_budget_between_is_kept_by_every_picture(run, capsys):
    save('in/a.png', photo(120, 150))
    costs = []
    for budget in (0.3, 0.6, 0.9):
        assert run('--budget', budget, '--cost', 'macs', '--patch-size', 16, '--overwrite') == 0
        costs.append(float(re.search(r'cost ([\d.]+)', capsys.readouterr().out).group(1)))
        assert budget - 0.05 < costs[-1] <= budget
    assert costs == sorted(costs)


@pytest.mark.slow
def test_maps_show_the_classes(run):
    save('in/small.png', photo(20, 30))
    save('in/tall.png', photo(2100, 3, 4, 'uint16'))
    save('in/gray.png', photo(16, 16, 2))
    for budget, hue in ((0.01, 1), (99, 2)):  # green, red, in BGR
        folder = f'out{hue}'
        assert run('--map', '--budget', budget, '--cost', 'macs', output=folder) == 0
        assert written(folder) == sorted(f'{name}{end}.png' for name in ('small', 'tall', 'gray')
                                         for end in ('', '_map'))
        for name, size in (('small', (360, 540)), ('tall', (2048, 3)), ('gray', (512, 512))):
            drawn = cv2.imread(f'{folder}/{name}_map.png', cv2.IMREAD_UNCHANGED)
            legend = drawn.shape[0] - size[0]
            assert drawn.dtype == np.uint8 and drawn.shape[1:] == (max(190, size[1]), 3) and 26 <= legend <= 78
            plain = cv2.imread(f'in/{name}.png', cv2.IMREAD_COLOR).mean(axis=(0, 1))
            tint = drawn[:size[0], :size[1]].mean(axis=(0, 1)) - 0.6 * plain
            np.testing.assert_allclose(tint, 0.4 * 255 * np.eye(3)[hue], atol=4)


def test_a_map_shows_where_the_hard_tiles_are(run, models):
    pixels = photo(16, 64)
    pixels[:, 32:] = photo(16, 32, seed=3)
    save('in/a.png', pixels)
    x = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) / 255
    kinds = [int(models[1]['cdnsr_x2'].classifier(x[..., left:left + 16]).argmax()) for left in (0, 16, 32, 48)]
    assert len(set(kinds)) > 1
    assert run('--map', '--patch-size', 16, '--step', 16, '--ext', 'jpg') == 0
    assert written() == ['a.jpg', 'a_map.png']
    drawn = cv2.imread('out/a_map.png')[:128]  # the pictures are eight times as large there
    for kind, left in zip(kinds, (0, 16, 32, 48)):
        tile = drawn[2:-2, 8 * left + 2:8 * left + 126].mean(axis=(0, 1))
        tint = tile - 0.6 * pixels[:, left:left + 16, ::-1].mean(axis=(0, 1))
        np.testing.assert_allclose(tint, 0.4 * np.array([(0, 255, 0), (0, 255, 255), (0, 0, 255)][kind]), atol=4)


# mistakes

MISTAKES = [
    (('--budget', 0), '--budget 0.0: expected a number above 0'),
    (('--budget', -1), '--budget -1.0: expected a number above 0'),
    (('--budget', 'nan'), '--budget nan: expected a number above 0'),
    (('--budget', 'inf'), '--budget inf: expected a number above 0'),
    (('--budget', 'much'), "argument --budget: invalid float value: 'much'"),
    (('--target-ms', 0), '--target-ms 0.0: expected a number above 0'),
    (('--target-ms', 'nan'), '--target-ms nan: expected a number above 0'),
    (('--max-loss', 0), '--max-loss 0.0: expected a number above 0'),
    (('--budget', 1, '--max-loss', 1), 'argument --max-loss: not allowed with argument --budget'),
    (('--weigh', 'people'), "argument --weigh: invalid choice: 'people' (choose from"),
    (('--budget', 1, '--target-ms', 1), 'argument --target-ms: not allowed with argument --budget'),
    (('--cost', 'money'), "argument --cost: invalid choice: 'money' (choose from"),
    (('--shard', '0/2'), '--shard 0/2: expected I/N with I from 1 to N, for example 2/8'),
    (('--shard', '3/2'), '--shard 3/2: expected'),
    (('--shard', 'x'), '--shard x: expected'),
    (('--shard', '1/'), '--shard 1/: expected'),
    (('--shard', '1/2/3'), '--shard 1/2/3: expected'),
    (('--shard=-1/2', ), '--shard -1/2: expected'),
    (('--ext', 'gif'), '--ext gif: accepted: png, jpg, webp, tif'),
    (('--ext', ''), '--ext : accepted: png, jpg, webp, tif'),
    (('--suffix', 'a/b'), '--suffix a/b: expected no /'),
    (('--precision', 'int8'), "argument --precision: invalid choice: 'int8' (choose from"),
    (('--device', 'nonsense'), '--device nonsense: cannot be used: '),
    (('--device', 'cuda:99'), '--device cuda:99: cannot be used: '),
    (('--patch-size', 1), '--patch-size 1: expected at least 8'),
    (('--patch-size', 0), "argument --patch-size: expected an integer of at least 1, but got '0'"),
    (('--patch-size', 'x'), "argument --patch-size: expected an integer of at least 1, but got 'x'"),
    (('--patch-size', 16, '--step', 17), '--step 17: expected at most the patch size, 16'),
    (('--step', 97), '--step 97: expected at most the patch size, 96'),
    (('--step', 0), "argument --step: expected an integer of at least 1, but got '0'"),
    (('--nonsense', ), 'unrecognized arguments: --nonsense'),
    (('-i', 'nowhere'), 'nowhere: no such file or folder'),
    (('-i', 'empty'), 'empty: contains no image (.png, .jpg, '),
    (('-i', ''), '-i: expected a path, but got nothing'),
    (('-i', 'x' * 300), "[Errno 36] File name too long: 'xxx"),
    (('-o', 'file'), 'file: the folder for the results cannot be created: File exists'),
    (('-o', 'file/sub'), 'file/sub: the folder for the results cannot be created: Not a directory'),
    (('-o', ''), '-o: expected a path, but got nothing'),
    (('-m', 'nowhere.pth'), 'nowhere.pth: no such checkpoint file'),
    (('-m', 'in'), 'in: no such checkpoint file'),
    (('-m', './in'), './in: is a folder; expected a checkpoint'),
    (('-m', 'file'), 'file: not a readable checkpoint ('),
    (('-m', ''), '-m: a checkpoint is needed: -m MODEL, or -opt FILE that names one'),
    (('-opt', 'nowhere.yml'), 'nowhere.yml: no such option file'),
]


@pytest.mark.parametrize('arguments,message', MISTAKES, ids=[' '.join(map(str, item[0]))[:40] for item in MISTAKES])
def test_a_mistake_is_said_in_one_line(run, capsys, arguments, message):
    save('in/a.png', photo(9, 9))
    Path('empty').mkdir()
    Path('file').write_text('no model, no folder')
    if '99' in message and torch.cuda.device_count() > 99:
        pytest.skip('there is such a GPU')
    assert run(*arguments) == 2
    line = one_line(capsys)
    assert re.match('basicsr( upscale)?: error: ', line) and line.split('error: ', 1)[1].startswith(message)
    assert written('.') == ['file', 'in/a.png']


def test_a_model_is_needed(run, capsys):
    save('in/a.png', photo(9, 9))
    assert run(model=None) == 2
    assert one_line(capsys).startswith('basicsr: error: -m: a checkpoint is needed')
    assert run('-m', 'a.pth', source=None) == 2
    assert 'arguments are required: -i' in one_line(capsys)


@pytest.mark.parametrize('flag', [('--budget', '0.5'), ('--target-ms', '5'), ('--max-loss', '5'), ('--map', )])
def test_only_branches_can_be_chosen_from(run, capsys, flag):
    save('in/a.png', photo(9, 9))
    assert run(*flag, model='plain') == 2
    value = ''.join(f' {text}' for text in flag[1:])
    assert one_line(capsys) == f'basicsr: error: {flag[0]}{value}: needs a network that routes, CDNSR or PCSR'


@pytest.mark.parametrize('key,value,message', [
    ('network_g', None, 'is of no known family; known:'),
    ('network_g', 'x', "network_g: expected a block of options with a key 'type'"),
    ('network_g', dict(type='Nix'), "network_g.type: unknown type 'Nix'; accepted: "),
    ('network_g', dict(fsrcnn(4, 2),
                       num_feat='x'), "network_g.num_feat: expected an integer from 1 to 65536, but got 'x'"),
    ('network_g', pixels_block(3), 'does not fit the network SinglePixels: '),
    ('network_g', dict(cdnsr_block(), branches=3), 'network_g.branches: expected a list of 2 to 5 branches, but got 3'),
    ('params', None, "expected 'params' or 'params_ema', but found network_g, scale"),
    ('params', 5, 'contains no weights: expected a dict of tensors'),
])
def test_models_that_are_refused(run, models, capsys, key, value, message):
    save('in/a.png', photo(9, 9))
    content = dict(params=models[1]['plain'].state_dict(), network_g=pixels_block(), scale=2)
    content[key] = value
    save_checkpoint({key: value for key, value in content.items() if value is not None}, 'bad.pth')
    assert run('-m', 'bad.pth') == 2
    assert one_line(capsys).startswith(f'basicsr: error: bad.pth: {message}')
    assert not Path('out').exists()


def test_weights_that_are_not_finite_are_refused(run, models, capsys):
    save('in/a.png', photo(4, 4))
    content = torch.load(models[0] / 'plain.pth')
    next(iter(content['params'].values())).view(-1)[0] = torch.nan
    torch.save(content, 'nan.pth')
    assert cli.main(['upscale', '-m', 'nan.pth', '-i', 'in', '-o', 'out']) == 2
    assert one_line(capsys).startswith('basicsr: error: nan.pth: contains values that are not finite in ')
    assert not Path('out').exists()


def test_a_network_that_upscales_nothing_is_refused(run, capsys):
    save('in/a.png', photo(9, 9))
    block = dict(type='PatchClassifier', num_classes=3, num_feat=8)
    save_checkpoint(dict(params=build_network(dict(block)).state_dict(), network_g=block), 'bad.pth')
    assert run('-m', 'bad.pth') == 2
    assert one_line(capsys).startswith('basicsr: error: bad.pth: network_g.type: PatchClassifier is not a network that '
                                       'enlarges an image')


@pytest.mark.slow
def test_option_files(run, models, capsys, monkeypatch):
    """They describe a network, name its checkpoint and the size of its tiles; flags go before."""
    pixels = save('in/a.png', photo(30, 30))
    torch.save({'params': models[1]['plain'].state_dict()}, 'weights.pth')
    seen = []
    original = TileUpscaler.__init__

    def watch(self, net, patch_size, step, *args, **kwargs):
        seen.append((patch_size, step))
        original(self, net, patch_size, step, *args, **kwargs)

    monkeypatch.setattr(TileUpscaler, '__init__', watch)
    opt = dict(network_g=pixels_block(), path=dict(pretrain_network_g='weights.pth'), tile=dict(patch_size=16, step=12))
    Path('a.yml').write_text(yaml.safe_dump(opt))
    assert run('-m', 'weights.pth', output='none') == 2
    assert 'give the option file that it was trained with: -opt FILE' in one_line(capsys)
    for arguments in ((), ('-m', 'weights.pth'), ('--step', 16), ('--patch-size', 32)):
        assert run('-opt', 'a.yml', '--overwrite', *arguments, model=None) == 0
        assert_same(load(Path('out/a.png')), slow(models[1]['plain'], pixels))
    assert seen == [(16, 12), (16, 12), (16, 16), (32, None)]
    capsys.readouterr()
    for change, message in ((dict(tile=5), 'a.yml: tile: expected a block of options, but got 5'),
                            (dict(tile=dict(overlap=4)),
                             'a.yml: tile.overlap: unknown key; accepted: patch_size, step'),
                            (dict(tile=dict(step='x')),
                             "a.yml: tile.step: expected an integer at least 1, but got 'x'"),
                            (dict(tile=dict(patch_size=16, step=20)),
                             'a.yml: tile.step: expected at most the patch size, 16, but got 20'),
                            (dict(path={}), 'a.yml: names no checkpoint at path.pretrain_network_g; give one with -m'),
                            (dict(path=dict(pretrain_network_g='no.pth')), 'no.pth: no such checkpoint file'),
                            (dict(network_g=None),
                             'a.yml: has no network_g block'), (dict(network_g=fsrcnn(4, 2)),
                                                                'weights.pth: does not fit the network FSRCNN: ')):
        Path('a.yml').write_text(yaml.safe_dump({**opt, **change}))
        assert run('-opt', 'a.yml', model=None) == 2
        assert one_line(capsys).startswith(f'basicsr: error: {message}')


def test_a_folder_that_cannot_be_written_to(run, capsys, monkeypatch):
    save('in/a.png', photo(9, 9))
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: False if Path(path).name == 'out' else access(path, mode))
    assert run() == 2
    assert one_line(capsys) == 'basicsr: error: out: the folder for the results is not writable'
    assert written() == []


@pytest.mark.slow
def test_an_interrupted_run_leaves_what_is_complete(run, capsys, monkeypatch):
    for name in 'abc':
        save(f'in/{name}.png', photo(9, 9, seed=ord(name)))
    original, calls = upscale.write_image, []

    def interrupt(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(path, *args)

    monkeypatch.setattr(upscale, 'write_image', interrupt)
    assert run('--map') == 130
    assert one_line(capsys) == 'basicsr: interrupted'
    assert written() == ['a.png', 'a_map.png']
    assert run('--map') == 0
    assert len(written()) == 6


def test_strips_make_no_difference(run, models, monkeypatch):
    pixels = save('in/a.tif', photo(150, 40, 4, 'uint16'))
    monkeypatch.setitem(tile_upscaler.CANVAS_BYTES, 'cpu', 1)
    assert run('--patch-size', 16, model='plain') == 0
    assert_same(load(Path('out/a.tif')), slow(models[1]['plain'], pixels))
