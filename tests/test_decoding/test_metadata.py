"""EXIF and XMP of results: the photograph's, upright, of the result's size."""
import numpy as np
import pytest
import struct
import tifffile
from PIL import Image

from cdnsr_basicsr.decoding.formats import png_chunk
from cdnsr_basicsr.decoding.metadata import add_to_tiff, pack_exif, read_exif
from cdnsr_basicsr.inference import image_io
from cdnsr_basicsr.inference.image_io import read_image, write_image

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6" exif:PixelXDimension="30" tiff:ImageLength=\'20\'>'
    '<dc:rights>Jörg</dc:rights><xmp:Thumbnails>/9j/4AA</xmp:Thumbnails></rdf></x:xmpmeta>').encode()
ARTIST = 'J\u00f6rg'.encode()
DATE, CAMERA, COPYRIGHT = b'2024:01:02 03:04:05', b'Camera 1', '\u00a9 me'.encode()


def entry(order, tag, kind, value, place):
    """A row of a directory, and what does not fit into it."""
    count = len(value) // {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 10: 8}[kind]
    stored = value.ljust(4, b'\0') if len(value) <= 4 else struct.pack(f'{order}I', place)
    return struct.pack(f'{order}HHI', tag, kind, count) + stored, b'' if len(value) <= 4 else value + b'\0' * (
        len(value) % 2)


def directory(order, place, entries, following=0):
    rows, values, end = b'', b'', place + 6 + 12 * len(entries)
    for tag, kind, value in sorted(entries):
        row, beside = entry(order, tag, kind, value, end + len(values))
        rows, values = rows + row, values + beside
    return struct.pack(f'{order}H', len(entries)) + rows + struct.pack(f'{order}I', following) + values


def exif(order='<'):
    """Written by hand: caption, camera, orientation, date, copyright, size, lens, maker note, GPS and a thumbnail."""

    def pack(form, *numbers):
        return struct.pack(order + form, *numbers)

    photograph = [(0x9003, 2, DATE + b'\0'), (0xA002, 3, pack('H', 30)), (0xA003, 4, pack('I', 20)),
                  (0x920A, 5, pack('II', 50, 1)), (0x9204, 10, pack('ii', -1, 3)), (0x927C, 7, b'maker note' * 9),
                  (0x9000, 7, b'0230'), (0x8827, 3, pack('HH', 100, 200))]
    gps = [(1, 2, b'N\0'), (2, 5, pack('IIIIII', 47, 1, 30, 1, 25, 2)), (0, 1, b'\2\3\0\0')]
    first = [(0x10F, 2, CAMERA + b'\0'), (0x112, 3, pack('H', 6)), (0x13B, 2, ARTIST + b'\0'),
             (0x8298, 2, COPYRIGHT + b'\0'), (0x11A, 5, pack('II', 300, 1)), (0x100, 4, pack('I', 30))]
    pointers = [(0x8769, 4, bytes(4)), (0x8825, 4, bytes(4))]
    end = 8 + len(directory(order, 8, first + pointers))
    after = end + len(directory(order, end, photograph))
    last = after + len(directory(order, after, gps))
    pointers = [(0x8769, 4, pack('I', end)), (0x8825, 4, pack('I', after))]
    thumbnail = directory(order, last, [(0x201, 4, pack('I', last)), (0x202, 4, pack('I', 9))]) + b'thumbnail' * 99
    head = {'<': b'II', '>': b'MM'}[order] + pack('HI', 42, 8)
    return head + directory(order, 8, first + pointers, last) + directory(order, end, photograph) + directory(
        order, after, gps) + thumbnail


def source(path, data, xmp=XMP, profile=b'profile' * 30):
    """A photograph of 30x20 that lies on its side."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    if path.suffix in ('.jpg', '.webp', '.avif'):
        Image.fromarray(pixels).save(path, exif=b'Exif\0\0' + data, xmp=xmp, icc_profile=profile)
    elif path.suffix == '.png':
        Image.fromarray(pixels).save(path, exif=data, icc_profile=profile)
        chunks = png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + xmp)
        path.write_bytes(path.read_bytes()[:33] + chunks + path.read_bytes()[33:])
    else:
        tifffile.imwrite(
            path,
            pixels,
            photometric='rgb',
            software=False,
            byteorder={
                b'II': '<',
                b'MM': '>'
            }[data[:2]],
            extratags=[(34675, 7, len(profile), profile, True), (274, 3, 1, 6, True)])
        add_to_tiff(path, b'Exif\0\0' + data, xmp)
        with tifffile.TiffFile(path, mode='r+') as tif:
            tif.pages.first.tags[274].overwrite(6)
    return path


def assert_kept(path, letters=True):
    """By Pillow, an independent reader."""
    with Image.open(path) as image:
        found, size = image.getexif(), image.size
        photograph, gps = found.get_ifd(0x8769), found.get_ifd(0x8825)
        xmp = image.info.get('xmp') or image.info['XML:com.adobe.xmp'].encode()
        assert image.info['icc_profile'] == b'profile' * 30
    assert found[0x10F] == CAMERA.decode() and found[0x112] == 1 and found[0x11A] == 300
    if letters:
        assert found[0x13B].encode('latin-1') == ARTIST and found[0x8298].encode('latin-1') == COPYRIGHT
    assert photograph[0x9003] == DATE.decode() and photograph[0x920A] == 50 and photograph[0x927C] == b'maker note' * 9
    assert photograph[0x9204] == pytest.approx(-1 / 3) and photograph[0x9000] == b'0230'
    assert photograph[0x8827] == (100, 200)
    assert (photograph[0xA002], photograph[0xA003]) == size == (80, 120)
    assert gps[1] == 'N' and gps[2] == (47, 30, 12.5)
    assert b'thumbnail' not in path.read_bytes() and b'Thumbnails' not in path.read_bytes()
    assert b'tiff:Orientation="1"' in xmp and 'Jörg'.encode() in xmp
    assert b'exif:PixelXDimension="80"' in xmp and b"tiff:ImageLength='120'" in xmp


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('read', ['jpg', 'webp', 'avif', 'png', 'tif'])
@pytest.mark.parametrize('written', ['png', 'jpg', 'webp', 'tif'])
def test_metadata_are_kept_upright_and_of_the_right_size(read, written, order, tmp_path):
    if (read, order) == ('tif', '>'):
        pytest.skip('add_to_tiff writes little-endian files')
    picture = read_image(source(tmp_path / f'a.{read}', exif(order)))
    assert picture.pixels.shape == (30, 20, 3)
    pixels = np.zeros((120, 80, 3), np.uint8)
    path = tmp_path / f'b.{written}'
    assert write_image(path, pixels.shape, pixels.dtype, [pixels], *picture[1:4]) == ()
    assert_kept(path, letters=read != 'avif')  # of which Pillow makes question marks, where it turns them
    assert read_image(path).icc_profile == picture.icc_profile


def test_a_bigtiff_keeps_them_too(tmp_path, monkeypatch):
    picture = read_image(source(tmp_path / 'a.jpg', exif()))
    monkeypatch.setattr(image_io, 'BIGTIFF_BYTES', 1)
    pixels = np.random.default_rng(0).integers(0, 255, (120, 80, 3), np.uint8)
    write_image(tmp_path / 'b.tif', pixels.shape, pixels.dtype, [pixels], *picture[1:4])
    assert_kept(tmp_path / 'b.tif')
    with tifffile.TiffFile(tmp_path / 'b.tif') as tif:
        assert tif.is_bigtiff and len(tif.pages) == 1 and np.array_equal(tif.asarray(), pixels)
        assert tif.pages.first.tags['ExifTag'].value['DateTimeOriginal'] == DATE.decode()
        assert tif.pages.first.tags['GPSTag'].value['GPSLatitudeRef'] == 'N'


@pytest.mark.parametrize('channels,dtype', [(1, 'uint8'), (2, 'uint8'), (4, 'uint8'), (1, 'uint16'), (2, 'uint16'),
                                            (3, 'uint16'), (4, 'uint16')])
@pytest.mark.parametrize('kind', ['png', 'tif', 'webp'])
def test_every_kind_of_pixels_keeps_them(kind, channels, dtype, tmp_path):
    if (kind, dtype) == ('webp', 'uint16'):
        pytest.skip('WebP has 8 bits')
    picture = read_image(source(tmp_path / 'a.jpg', exif()))
    pixels = np.zeros((12, 8, channels), dtype)
    write_image(tmp_path / f'b.{kind}', pixels.shape, pixels.dtype, [pixels], *picture[1:4])
    result = read_image(tmp_path / f'b.{kind}')
    assert read_exif(result.exif).below.keys() == {0x8769, 0x8825} and b'J\xc3\xb6rg' in result.xmp
    assert np.array_equal(result.pixels[..., -1:], pixels[..., -1:])


def test_what_jpeg_has_no_room_for_is_said(tmp_path):
    data = exif().replace(b'maker note' * 9, b'm' * 90)
    picture = read_image(source(tmp_path / 'a.png', data, XMP + b' ' * 70000))
    pixels = np.zeros((120, 80, 3), np.uint8)
    lost = write_image(tmp_path / 'b.jpg', pixels.shape, pixels.dtype, [pixels], None, picture.exif,
                       picture.xmp + b'x' * 70000)
    assert lost == ('JPEG has no room for its XMP', )
    long = picture.exif + b'\0' * 10
    parsed = read_exif(long)
    parsed.below[0x8769].entries[0x927C] = (7, b'm' * 70000)
    lost = write_image(tmp_path / 'b.jpg', pixels.shape, pixels.dtype, [pixels], None, pack_exif(parsed))
    assert lost == ('JPEG has no room for its maker note', )
    with Image.open(tmp_path / 'b.jpg') as image:
        assert image.getexif().get_ifd(0x8769)[0x9003] == DATE.decode()


@pytest.mark.slow
def test_broken_metadata_never_fail_an_image(tmp_path):
    rng, whole = np.random.default_rng(0), exif()
    for number in range(48):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data) if number % 2 else 60)] = rng.integers(256)
        data = data[:rng.integers(len(data))] if number % 3 == 0 else data
        kind = ('jpg', 'png', 'webp')[number % 3]
        pixels = np.zeros((4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'a.{kind}', exif=b'Exif\0\0' + bytes(data))
        picture = read_image(tmp_path / f'a.{kind}')
        for written in ('png', 'jpg', 'webp', 'tif'):
            write_image(tmp_path / f'b.{written}', pixels.shape, pixels.dtype, [pixels], *picture[1:4])
            with Image.open(tmp_path / f'b.{written}') as image:
                image.load()
            read_image(tmp_path / f'b.{written}')


def test_a_directory_in_a_circle_ends(tmp_path):
    data = bytearray(exif())
    place = data.index(struct.pack('<HHI', 0x8769, 4, 1)) + 8
    data[place:place + 4] = struct.pack('<I', 8)
    assert read_exif(bytes(data)).below[0x8769].entries


def test_captions_of_microscopes_are_not_kept(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', np.zeros((3, 9, 9), np.uint8), imagej=True)
    picture = read_image(tmp_path / 'a.tif')
    assert b'ImageJ=' not in (picture.exif or b'') and picture.notes == ('only the first of 3 pages', )
