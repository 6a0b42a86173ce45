import cv2
import io
import itertools
import numpy as np
import os
import png
import pytest
import resource
import struct
import tifffile
import zlib
from PIL import Image, ImageOps

from cdnsr_basicsr.inference import image_io
from cdnsr_basicsr.inference.image_io import (
    EXTENSIONS,
    ImageError,
    check_writable,
    list_images,
    read_image,
    write_image,
)
from tests.helpers import decode_by_pypng

SIZES = [(1, 1), (7, 300), (301, 5), (270, 523)]


def ramp(height, width, channels, dtype):
    """Smooth, different in each channel, in 16 bits no multiple of 257."""
    y, x, c = np.mgrid[:height, :width, :channels]
    values = (90 + 60 * np.sin((x + 3 * y) / 40 + c) + 20 * c).astype(np.uint8)
    return values if dtype == 'uint8' else 257 * values.astype(np.uint16) + 3 + c.astype(np.uint16)


def every(*values):
    return list(itertools.product(*values))


def noise(*shape, dtype='uint8'):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def cut(pixels, rows):
    return (pixels[top:top + rows] for top in range(0, len(pixels), rows))


def save(path, pixels, rows=37, profile=None):
    write_image(path, pixels.shape, pixels.dtype, cut(pixels, rows), profile)
    return path


def assert_refused(path, *words):
    with pytest.raises(ImageError) as info:
        read_image(path)
    message = str(info.value)
    assert message.startswith(f'{path}: ') and '; accepted: ' in message and '\n' not in message
    for word in words:
        assert word in message


# reading PNG


@pytest.mark.slow
def test_pngsuite_equals_pypng(shared):
    files = [path for path in sorted(shared('data/pngsuite').glob('*.png')) if not path.name.startswith('x')]
    assert len(files) > 150
    for path in files:
        expected, depth = decode_by_pypng(path)
        pixels = read_image(path).pixels
        assert pixels.dtype == (np.uint16 if depth == 16 else np.uint8), path.name
        assert pixels.shape == expected.shape, path.name
        assert np.array_equal(pixels, expected), path.name


def test_broken_files_of_pngsuite_are_refused(shared):
    files = sorted(shared('data/pngsuite').glob('x*.png'))
    assert len(files) == 14
    for path in files:
        assert_refused(path)


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_transparent_gray_becomes_alpha(bits, tmp_path):
    values = np.arange(64).reshape(8, 8) % 2**bits
    with open(tmp_path / 'a.png', 'wb') as file:
        png.Writer(8, 8, greyscale=True, bitdepth=bits, transparent=1).write(file, values.tolist())
    pixels, white = read_image(tmp_path / 'a.png').pixels, 65535 if bits == 16 else 255
    assert np.array_equal(pixels[..., 0], values * (1 if bits == 16 else 255 // (2**bits - 1)))
    assert np.array_equal(pixels[..., 1], np.where(values == 1, 0, white))


@pytest.mark.parametrize('bits', [8, 16])
def test_a_transparent_colour_becomes_alpha(bits, tmp_path):
    values = noise(6, 5, 3, dtype=f'uint{bits}')
    values[2, 3] = values[4, 1] = 7, 8, 9
    with open(tmp_path / 'a.png', 'wb') as file:
        png.Writer(5, 6, greyscale=False, bitdepth=bits, transparent=(7, 8, 9)).write(file, values.reshape(6, -1))
    pixels = read_image(tmp_path / 'a.png').pixels
    assert np.array_equal(pixels[..., :3], values)
    assert set(zip(*np.nonzero(pixels[..., 3] == 0))) == {(2, 3), (4, 1)} and pixels[0, 0, 3] == 2**bits - 1


def test_a_palette_with_transparency_becomes_rgba(tmp_path):
    palette = [(10, 20, 30, 255), (40, 50, 60, 128), (70, 80, 90, 0)]
    values = np.arange(12).reshape(3, 4) % 3
    with open(tmp_path / 'a.png', 'wb') as file:
        png.Writer(4, 3, palette=palette, bitdepth=2).write(file, values.tolist())
    assert np.array_equal(read_image(tmp_path / 'a.png').pixels, np.array(palette)[values])


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def tiny_png(*chunks, rows=4):
    """A gray picture of 4x4 whose data have that many rows."""
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 8, 0, 0, 0, 0))
    data = chunk(b'IDAT', zlib.compress(b'\0abcd' * rows))
    return b'\x89PNG\r\n\x1a\n' + header + data + b''.join(chunks) + chunk(b'IEND', b'')


def test_gamma_is_ignored_and_exif_after_the_pixels_is_not(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / 'a.png'
    path.write_bytes(tiny_png(chunk(b'eXIf', exif.tobytes()[6:])))
    assert np.array_equal(read_image(path).pixels[..., 0], np.repeat([list(b'abcd')], 4, axis=0).T)
    path.write_bytes(tiny_png()[:33] + chunk(b'gAMA', struct.pack('>I', 100000)) + tiny_png()[33:])
    assert np.array_equal(read_image(path).pixels[..., 0], np.repeat([list(b'abcd')], 4, axis=0))


def test_a_broken_profile_or_exif_leaves_the_pixels_whole(tmp_path):
    path, whole = tmp_path / 'a.png', tiny_png()
    path.write_bytes(whole[:33] + chunk(b'iCCP', b'name\0\0no zlib') + chunk(b'eXIf', b'no exif') + whole[33:])
    picture = read_image(path)
    assert np.array_equal(picture.pixels[..., 0], np.repeat([list(b'abcd')], 4, axis=0))
    assert picture.icc_profile is None


@pytest.mark.parametrize('missing', [1, 12, 3000])
@pytest.mark.parametrize('name', ['a.png', b'\xff.png', 'a.tif', 'a.webp', 'a.jpg'])
def test_a_disk_that_is_full_before_the_end_leaves_no_file(name, missing, tmp_path):
    path, pixels = tmp_path / os.fsdecode(name), noise(40, 40, 3)
    save(path, pixels)
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size - missing, 1), limits[1]))
    try:
        with pytest.raises(OSError):
            save(path, pixels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_complete_png_with_too_few_rows_is_refused(tmp_path):
    (tmp_path / 'a.png').write_bytes(tiny_png(rows=2))
    assert_refused(tmp_path / 'a.png')


def test_a_damaged_transparent_colour_is_refused(tmp_path):
    transparent = chunk(b'tRNS', b'\0a')
    (tmp_path / 'a.png').write_bytes(tiny_png()[:33] + transparent + tiny_png()[33:])
    assert read_image(tmp_path / 'a.png').pixels.shape == (4, 4, 2)
    (tmp_path / 'a.png').write_bytes(tiny_png()[:33] + transparent.replace(b'\0a', b'\0b') + tiny_png()[33:])
    assert_refused(tmp_path / 'a.png', 'checksum')


# reading other formats


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpg', 'webp', 'png', 'none.tif', 'tiff_lzw.tif', 'tiff_adobe_deflate.tif'])
def test_the_picture_is_turned_upright_once(kind, orientation, tmp_path):
    pixels, exif = ramp(6, 9, 3, 'uint8'), Image.Exif()
    exif[274] = orientation
    path = tmp_path / f'a.{kind}'
    options = {'compression': kind.split('.')[0]} if kind.endswith('.tif') else {}
    if kind == 'none.tif':
        tifffile.imwrite(path, pixels, extratags=[(274, 3, 1, orientation, True)])
    else:
        Image.fromarray(pixels).save(path, exif=exif, lossless=True, **options)
    with Image.open(path) as picture:
        upright = Image.fromarray(np.asarray(picture)) if kind == 'jpg' else Image.fromarray(pixels)
    upright.getexif()[274] = orientation
    assert np.array_equal(read_image(path).pixels, np.asarray(ImageOps.exif_transpose(upright)))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_jpeg_kinds(mode, tmp_path):
    picture = Image.fromarray(ramp(20, 30, 3, 'uint8')).convert(mode)
    picture.save(tmp_path / 'a.jpg', icc_profile=b'profile' * 30)
    with Image.open(tmp_path / 'a.jpg') as stored:
        expected = np.asarray(stored.convert('L' if mode == 'L' else 'RGB'))
    pixels, profile = read_image(tmp_path / 'a.jpg')[:2]
    assert np.array_equal(pixels, expected.reshape(20, 30, -1))
    assert profile == (None if mode == 'CMYK' else b'profile' * 30)


def test_first_frame_of_an_animated_webp(tmp_path):
    frames = [Image.fromarray(ramp(20, 30, 3, 'uint8') + add) for add in (0, 9)]
    frames[0].save(tmp_path / 'a.webp', save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(read_image(tmp_path / 'a.webp').pixels, np.asarray(frames[0]))


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB'])
@pytest.mark.parametrize('kind', ['a.bmp', 'a.tif'])
def test_few_bits_palettes_and_plain_kinds(mode, kind, tmp_path):
    picture = Image.fromarray(ramp(20, 30, 3, 'uint8')).convert(mode)
    picture.save(tmp_path / kind)
    expected = np.asarray(picture.convert('RGB' if mode in ('P', 'RGB') else 'L')).reshape(20, 30, -1)
    assert np.array_equal(read_image(tmp_path / kind).pixels, expected)


@pytest.mark.parametrize('channels,dtype,planar,compression,order',
                         every((1, 2, 3, 4), ('uint8', 'uint16'), ('contig', 'separate'), (None, 'zlib'), '<>'))
def test_plain_tiff_is_exact(channels, dtype, planar, compression, order, tmp_path):
    pixels = noise(20, 30, channels, dtype=dtype)
    stored = np.moveaxis(pixels, 2, 0) if planar == 'separate' else pixels
    options = {'extrasamples': ['unassalpha']} if channels in (2, 4) else {}
    if channels == 1:
        stored = pixels[..., 0]
    else:
        options['planarconfig'] = planar
    tifffile.imwrite(
        tmp_path / 'a.tif',
        stored,
        photometric='rgb' if channels > 2 else 'minisblack',
        compression=compression,
        predictor=True if compression == 'zlib' else None,
        byteorder=order,
        **options)
    result = read_image(tmp_path / 'a.tif').pixels
    assert result.dtype == np.dtype(dtype) and np.array_equal(result, pixels)


@pytest.mark.parametrize('channels,dtype,compression', every((1, 3, 4), ('uint8', 'uint16'), (5, 8, 32773)))
def test_lzw_deflate_and_packbits_tiff_are_exact(channels, dtype, compression, tmp_path):
    pixels, order = noise(20, 30, channels, dtype=dtype), {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    cv2.imwrite(str(tmp_path / 'a.tif'), pixels[..., order], [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    with tifffile.TiffFile(tmp_path / 'a.tif') as tif:
        assert tif.pages[0].compression == compression
    result = read_image(tmp_path / 'a.tif').pixels
    assert result.dtype == np.dtype(dtype) and np.array_equal(result, pixels)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_tiff_with_white_as_zero(dtype, tmp_path):
    pixels = noise(20, 30, 1, dtype=dtype)
    tifffile.imwrite(tmp_path / 'a.tif', ~pixels[..., 0], photometric='miniswhite')
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, pixels)


@pytest.mark.parametrize('order', '<>')
def test_a_raw_tiff_is_mapped_if_its_byte_order_allows(order, tmp_path):
    pixels = noise(20, 30, 3, dtype='uint16')
    tifffile.imwrite(
        tmp_path / 'a.tif',
        pixels,
        photometric='rgb',
        byteorder=order,
        extratags=[(34675, 7, 210, b'profile' * 30, True)])
    result, profile = read_image(tmp_path / 'a.tif')[:2]
    native = np.dtype(f'{order}u2').isnative
    assert isinstance(result, np.memmap) == native and np.array_equal(result, pixels)
    assert profile == b'profile' * 30
    if native:
        assert not result.flags.writeable


@pytest.mark.parametrize('limit,big', [(20 * 30 * 3, True), (20 * 30 * 3 + 1, False)])
def test_a_large_tiff_is_a_bigtiff(tmp_path, monkeypatch, limit, big):
    pixels = noise(20, 30, 3)
    monkeypatch.setattr(image_io, 'BIGTIFF_BYTES', limit)
    write_image(tmp_path / 'a.tif', pixels.shape, pixels.dtype, [pixels])
    with tifffile.TiffFile(tmp_path / 'a.tif') as tif:
        assert tif.is_bigtiff == big and tif.pages[0].is_tiled
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, pixels)


def test_first_page_of_a_tiff(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'a.tif') as tif:
        for add in (0, 9):
            tif.write(ramp(20, 30, 3, 'uint8') + add, photometric='rgb')
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, ramp(20, 30, 3, 'uint8'))


@pytest.mark.parametrize('dtype', ['float32', 'uint32', 'int16', 'float16'])
def test_other_numbers_than_8_or_16_bits_are_refused(dtype, tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', np.zeros((20, 30), dtype), photometric='minisblack')
    assert_refused(tmp_path / 'a.tif', 'bits')


@pytest.mark.parametrize('dtype,times', [('uint8', 1), ('uint16', 257)])
@pytest.mark.parametrize('planar,compression', every(('contig', 'separate'), (None, 'zlib')))
def test_premultiplied_tiff_is_divided_by_alpha(dtype, times, planar, compression, tmp_path):
    stored = times * np.full((4, 5, 4), (10, 20, 30, 51), dtype)
    stored[0, 0] = times * np.array((0, 0, 0, 0))
    stored[0, 1] = times * np.array((60, 51, 0, 51))  # brighter than white
    expected = times * np.full((4, 5, 4), (50, 100, 150, 51), dtype)
    expected[0, :2] = times * np.array([(0, 0, 0, 0), (255, 255, 0, 51)])
    tifffile.imwrite(
        tmp_path / 'a.tif',
        np.moveaxis(stored, 2, 0) if planar == 'separate' else stored,
        photometric='rgb',
        planarconfig=planar,
        compression=compression,
        extrasamples=['assocalpha'])
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, expected)


def test_the_content_tells_the_kind(tmp_path):
    pixels = ramp(20, 30, 3, 'uint8')
    Image.fromarray(pixels).save(tmp_path / 'a.png', 'BMP')
    assert np.array_equal(read_image(str(tmp_path / 'a.png')).pixels, pixels)


def test_pillows_limit_of_pixels_does_not_hold(tmp_path, monkeypatch):
    pixels = ramp(20, 30, 3, 'uint8')
    Image.fromarray(pixels).save(tmp_path / 'a.bmp')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / 'a.bmp')
    assert np.array_equal(read_image(tmp_path / 'a.bmp').pixels, pixels)
    assert Image.MAX_IMAGE_PIXELS == 20


# broken files


def encoded(kind):
    picture, stream = Image.fromarray(noise(48, 40, 3)), io.BytesIO()
    options = {
        'progressive': ('JPEG', {
            'progressive': True
        }),
        'lossless': ('WEBP', {
            'lossless': True
        }),
        'raw': ('TIFF', {}),
        'lzw': ('TIFF', {
            'compression': 'tiff_lzw'
        }),
        'deflate': ('TIFF', {
            'compression': 'tiff_adobe_deflate'
        }),
    }.get(kind, (kind, {}))
    if kind == 'png16':
        return cv2.imencode('.png', noise(48, 40, 3, dtype='uint16'))[1].tobytes()
    if kind in ('raw16', 'zlib16'):
        tifffile.imwrite(
            stream, noise(48, 40, 3, dtype='uint16'), photometric='rgb', compression=kind.strip('raw16') or None)
        return stream.getvalue()
    picture.save(stream, options[0], **options[1])
    return stream.getvalue()


@pytest.mark.parametrize(
    'kind',
    ['PNG', 'png16', 'JPEG', 'progressive', 'WEBP', 'lossless', 'BMP', 'raw', 'lzw', 'deflate', 'raw16', 'zlib16'])
def test_truncated_files_are_refused_without_noise(kind, tmp_path, capfd):
    data, path = encoded(kind), tmp_path / 'a.bin'
    path.write_bytes(data)
    assert read_image(path).pixels.shape == (48, 40, 3)
    for length in [1, 4, 8, 20, 60] + [len(data) * part // 16 for part in range(1, 16)] + [len(data) - 12]:
        path.write_bytes(data[:length])
        assert_refused(path)
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('position', [0.3, 0.6, 0.9])
@pytest.mark.parametrize('kind', ['PNG', 'png16', 'deflate', 'zlib16'])
def test_damaged_data_are_refused(kind, position, tmp_path):
    data = bytearray(encoded(kind))
    data[int(position * len(data))] ^= 1
    (tmp_path / 'a.bin').write_bytes(data)
    assert_refused(tmp_path / 'a.bin')


@pytest.mark.parametrize('extension', EXTENSIONS)
def test_what_is_no_picture_is_refused(extension, tmp_path):
    path = tmp_path / f'a{extension}'
    assert_refused(path, 'No such file')
    for data in (b'', b'not a picture, but some lines of text\n' * 20, b'II*\0', b'\x89PNG\r\n\x1a\n',
                 b'\xff\xd8\xff\xe0'):
        path.write_bytes(data)
        assert_refused(path)
    path.unlink()
    path.mkdir()
    assert_refused(path, 'not a file')


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    assert_refused(tmp_path / 'a.png', 'not a file')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_forbidden_file_is_refused(tmp_path):
    path = save(tmp_path / 'a.png', ramp(4, 4, 1, 'uint8'))
    path.chmod(0)
    assert_refused(path, 'Permission denied')


# writing


@pytest.mark.parametrize('kind,size,channels,dtype',
                         every(('.png', '.tif', '.TIFF', '.PNG'), SIZES, (1, 2, 3, 4), ('uint8', 'uint16')))
def test_lossless_round_trip(kind, size, channels, dtype, tmp_path):
    pixels = noise(*size, channels, dtype=dtype)
    result, profile = read_image(save(tmp_path / f'a{kind}', pixels))[:2]
    expected = pixels[..., [0, 0, 0, 1]] if (kind.lower(), channels, dtype) == ('.png', 2, 'uint16') else pixels
    assert result.dtype == pixels.dtype and np.array_equal(result, expected) and profile is None


@pytest.mark.parametrize('rows', [1, 256, 257, 1000])
def test_the_height_of_strips_does_not_matter(rows, tmp_path):
    pixels = noise(600, 300, 3)
    assert np.array_equal(read_image(save(tmp_path / 'a.tif', pixels, rows)).pixels, pixels)


@pytest.mark.parametrize('kind,channels', every(['.jpg', '.jpeg'], [1, 3]) + every(['.webp'], [1, 2, 3, 4]))
def test_lossy_round_trip(kind, channels, tmp_path):
    pixels = ramp(61, 83, channels, 'uint8')
    if channels in (2, 4):
        pixels[..., -1] = np.maximum(pixels[..., -1], 1)
    result = read_image(save(tmp_path / f'a{kind}', pixels)).pixels
    expected = pixels[..., {1: [0, 0, 0], 2: [0, 0, 0, 1]}[channels]] if kind == '.webp' and channels < 3 else pixels
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).mean() < 1.5 and np.abs(result.astype(int) - expected).max() <= 12


@pytest.mark.parametrize(
    'kind,channels,dtype',
    every(['.png', '.tif'], [1, 3, 4], ['uint8', 'uint16']) + every(['.png'], [2], ['uint8']) +
    every(['.jpg'], [1, 3], ['uint8']) + every(['.webp'], [3, 4], ['uint8']))
def test_the_profile_is_kept(kind, channels, dtype, tmp_path):
    path = save(tmp_path / f'a{kind}', ramp(20, 30, channels, dtype), profile=b'profile' * 300)
    assert read_image(path).icc_profile == b'profile' * 300
    with Image.open(path) as picture:
        assert picture.info['icc_profile'] == b'profile' * 300


def test_jpeg_keeps_the_colours_resolution(tmp_path):
    with Image.open(save(tmp_path / 'a.jpg', noise(16, 16, 3))) as picture:
        assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3


@pytest.mark.parametrize('kind', ['.png', '.tif', '.jpg'])
def test_a_failure_leaves_what_was_there(kind, tmp_path):
    pixels = ramp(300, 20, 3, 'uint8')

    def failing():
        yield pixels[:280]
        raise RuntimeError('no more')

    with pytest.raises(RuntimeError, match='no more'):
        write_image(tmp_path / f'a{kind}', pixels.shape, pixels.dtype, failing())
    assert list(tmp_path.iterdir()) == []
    before = save(tmp_path / f'a{kind}', pixels[:5]).read_bytes()
    with pytest.raises(AssertionError):
        write_image(tmp_path / f'a{kind}', pixels.shape, pixels.dtype, [pixels[:299]])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize('name,shape,dtype,words', [
    ('a.gif', (4, 4, 3), 'uint8', '.png, .jpg, .jpeg, .webp, .tif'),
    ('a', (4, 4, 3), 'uint8', 'use one of'),
    ('a.png', (2**14 + 1, 2**14, 1), 'uint8', 'use .tif'),
    ('a.jpg', (2**14, 2**14 + 1, 3), 'uint8', 'use .tif'),
    ('a.jpg', (65501, 4, 3), 'uint8', 'use .tif'),
    ('a.webp', (4, 16384, 3), 'uint8', 'use .tif'),
    ('a.jpeg', (4, 4, 4), 'uint8', 'use .png'),
    ('a.jpg', (4, 4, 2), 'uint8', 'use .png'),
    ('a.jpg', (4, 4, 3), 'uint16', 'use .png'),
    ('a.webp', (4, 4, 3), 'uint16', 'use .png'),
])
def test_what_a_format_cannot_hold_is_refused_before_any_work(name, shape, dtype, words, tmp_path):
    with pytest.raises(ImageError, match=words) as info:
        check_writable(tmp_path / name, shape, dtype)
    assert str(info.value).startswith(f'{tmp_path / name}: ') and '\n' not in str(info.value)
    with pytest.raises(ImageError):
        write_image(tmp_path / name, shape, dtype, iter(lambda: pytest.fail('a strip was asked for'), None))


@pytest.mark.parametrize('name,shape,dtype', [('a.png', (2**14, 2**14, 4), 'uint16'), ('a.JPG', (65500, 4, 3), 'uint8'),
                                              ('a.webp', (16383, 4, 4), 'uint8'),
                                              ('a.tiff', (10**5, 10**5, 4), 'uint16')])
def test_what_a_format_can_hold_is_not_refused(name, shape, dtype, tmp_path):
    check_writable(tmp_path / name, shape, dtype)


@pytest.mark.parametrize('kind,shape', [('.jpg', (65500, 2, 1)), ('.webp', (2, 16383, 3)), ('.png', (1, 10**6, 1))])
def test_the_limits_are_those_of_the_libraries(kind, shape, tmp_path):
    save(tmp_path / f'a{kind}', np.zeros(shape, np.uint8), shape[0])
    assert (tmp_path / f'a{kind}').stat().st_size


# folders


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')


def names(paths, root):
    return [str(path.relative_to(root)) for path in paths]


def test_every_file_of_a_folder_is_listed_once(tmp_path):
    touch(*(tmp_path / name for name in ('b.png', 'a.JFIF', 'c.avif', 'sub/d.gif', 'sub/notes.txt', 'none',
                                         '.hidden.png', '.hidden/e.png', 'x.heic')))
    found = list_images(tmp_path)
    assert names(found.images, tmp_path) == ['a.JFIF', 'b.png', 'c.avif', 'sub/d.gif', 'x.heic']
    assert names(found.others, tmp_path) == ['none', 'sub/notes.txt'] and not found.closed


def test_linked_folders_are_followed_without_loops(tmp_path):
    root, other = tmp_path / 'in', tmp_path / 'elsewhere'
    touch(root / 'a.png', root / 'sub/b.png', other / 'c.png', other / 'deep/d.png')
    (root / 'away').symlink_to(other)
    (root / 'again').symlink_to(other)
    (root / 'self').symlink_to('.')
    (root / 'sub/up').symlink_to('..')
    (other / 'back').symlink_to(root)
    (root / 'absub').symlink_to('sub')  # comes before the folder itself, which lies there too
    (root / 'lost').symlink_to('nowhere')
    found = list_images(root)
    assert names(found.images, root) == ['a.png', 'again/c.png', 'again/deep/d.png', 'sub/b.png']
    assert names(found.others, root) == ['lost']


def test_many_links_among_folders_take_no_time(tmp_path):
    for number in range(12):
        touch(tmp_path / f'{number}/a.png')
    for number in range(12):
        for other in range(12):
            (tmp_path / f'{number}/to{other}').symlink_to(tmp_path / f'{other}')
    assert len(list_images(tmp_path).images) == 12


def test_a_closed_folder_is_named(tmp_path, monkeypatch):
    touch(tmp_path / 'a.png', tmp_path / 'closed/b.png')
    scandir = os.scandir

    def closed(path):
        if os.fspath(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    found = list_images(tmp_path)
    assert names(found.images, tmp_path) == ['a.png']
    assert found.closed == [(tmp_path / 'closed', 'Permission denied')]
