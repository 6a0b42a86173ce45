"""Every layout of TIFF against tifffile's own reading: right colours, right way up."""
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from cdnsr_basicsr.inference.image_io import ImageError, read_image
from tests.helpers import turned

COMPRESSIONS = [None, 'lzw', 'zlib', 'packbits', 'zstd']
HEIGHT, WIDTH = 23, 37


def values(channels, dtype):
    """Neither smooth nor all noise, the last channel never 0."""
    y, x, c = np.mgrid[:HEIGHT, :WIDTH, :channels]
    noise = np.random.default_rng(0).integers(0, 30, y.shape)
    small = (90 + 60 * np.sin((x + 3 * y) / 9 + c) + noise).astype(dtype)
    return small if dtype == 'uint8' else small * 256 + x.astype(dtype)


def write(path, pixels, planar, orientation=1, **options):
    gray = pixels.shape[2] == 1
    stored = np.moveaxis(pixels, 2, 0) if planar == 'separate' else pixels
    if not gray:
        options['planarconfig'] = planar
    options.setdefault('photometric', 'rgb' if pixels.shape[2] > 2 else 'minisblack')
    tifffile.imwrite(path, pixels[..., 0] if gray else stored, extratags=[(274, 3, 1, orientation, True)], **options)


def as_tifffile_reads(path):
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        pixels = page.asarray()
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            pixels = np.moveaxis(pixels, 0, -1)
        return pixels.reshape(*pixels.shape[:2], -1), page.tags[274].value


@pytest.mark.slow
@pytest.mark.parametrize('compression', COMPRESSIONS)
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
def test_colours_and_orientation_equal_tifffiles(planar, dtype, compression, tmp_path):
    path = tmp_path / 'a.tif'
    for channels in (1, 3):
        for orientation in range(1, 9):
            for shape in ({}, {'rowsperstrip': 5}, {'tile': (16, 32)}):
                write(path, values(channels, dtype), planar, orientation, compression=compression, **shape)
                expected, tag = as_tifffile_reads(path)
                assert tag == orientation and np.array_equal(expected, values(channels, dtype))
                result = read_image(path).pixels
                assert result.dtype == dtype and np.array_equal(result, turned(expected, orientation)), orientation


@pytest.mark.parametrize('compression', COMPRESSIONS)
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('kind', ['unspecified', 'assocalpha', 'unassalpha'])
def test_only_what_is_called_alpha_is_alpha(kind, planar, dtype, compression, tmp_path):
    path = tmp_path / 'a.tif'
    for channels in (2, 4):
        for orientation in (1, 6, 7):
            write(path, values(channels, dtype), planar, orientation, compression=compression, extrasamples=[kind])
            stored = as_tifffile_reads(path)[0]
            if kind == 'unspecified':
                expected = stored[..., :-1]
            elif kind == 'unassalpha':
                expected = stored
            else:
                white, alpha = np.iinfo(dtype).max, stored[..., -1:].astype(float)
                colors = np.floor(stored[..., :-1].astype(float) * white / alpha + 0.5).clip(0, white)
                expected = np.concatenate([colors, alpha], axis=2).astype(dtype)
            assert np.array_equal(read_image(path).pixels, turned(expected, orientation)), (channels, orientation)


@pytest.mark.parametrize('planar', ['contig', 'separate'])
def test_of_several_extra_samples_alpha_is_taken(planar, tmp_path):
    pixels = values(6, 'uint8')
    write(tmp_path / 'a.tif', pixels, planar, extrasamples=['unspecified', 'unassalpha', 'unspecified'])
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, pixels[..., [0, 1, 2, 4]])


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_white_as_zero_leaves_alpha_alone(dtype, tmp_path):
    pixels = values(2, dtype)
    write(tmp_path / 'a.tif', pixels, 'contig', photometric='miniswhite', extrasamples=['unassalpha'])
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, np.dstack([~pixels[..., 0], pixels[..., 1]]))


@pytest.mark.parametrize('kind,compression', [('P', 'tiff_lzw'), ('P', None), ('CMYK', 'tiff_lzw'), ('1', 'group4'),
                                              ('1', 'tiff_deflate'), ('YCbCr', 'jpeg'), ('L', 'jpeg')])
@pytest.mark.parametrize('orientation', [1, 3, 6])
def test_other_kinds_are_pillows(kind, compression, orientation, tmp_path):
    image = Image.fromarray(values(3, 'uint8'))
    image = image.quantize(9) if kind == 'P' else image.convert(kind)
    image.save(tmp_path / 'plain.tif', compression=compression)
    image.save(tmp_path / 'a.tif', compression=compression, tiffinfo={274: orientation})
    with Image.open(tmp_path / 'plain.tif') as stored:
        expected = np.asarray(stored.convert('L' if kind in ('1', 'L') else 'RGB')).reshape(HEIGHT, WIDTH, -1)
    assert np.array_equal(read_image(tmp_path / 'a.tif').pixels, turned(expected, orientation))


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_floating_point_is_refused_by_name(dtype, compression, tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', np.ones((8, 8, 3), dtype), photometric='rgb', compression=compression)
    with pytest.raises(ImageError, match='a.tif: TIFF of .. bits, floating point'):
        read_image(tmp_path / 'a.tif')


def test_a_part_without_data_is_refused_and_not_black(tmp_path):
    pixels = values(3, 'uint8')
    for compression in ('zlib', None):
        path = tmp_path / 'a.tif'
        write(path, pixels, 'contig', compression=compression, rowsperstrip=5)
        with tifffile.TiffFile(path, mode='r+') as tif:
            tag = tif.pages.first.tags['StripByteCounts']
            tag.overwrite((*tag.value[:2], 0, *tag.value[3:]))
        with pytest.raises(ImageError, match='a part has no data'):
            read_image(path)


def test_a_preview_is_not_taken_for_the_picture(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'raw.tif') as tif:
        tif.write(values(3, 'uint8'), photometric='rgb', subfiletype=1)
        tif.write(values(3, 'uint8'), photometric='rgb')
    with pytest.raises(ImageError, match='begins with a preview'):
        read_image(tmp_path / 'raw.tif')


def test_the_tests_decode_with_imagecodecs():
    assert imagecodecs.ZSTD.available and imagecodecs.LZW.available
