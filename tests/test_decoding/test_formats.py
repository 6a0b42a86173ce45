"""Sizes are known before there is memory for them, PNGs reach their decoder clean, and every kind is told."""
import io
import numpy as np
import pytest
import re
import struct
import zlib
from PIL import Image

from cdnsr_basicsr.decoding import process
from cdnsr_basicsr.decoding.formats import PNG_SIGNATURE, kind_of, png_chunk
from cdnsr_basicsr.inference.image_io import ImageError, read_image

SIDE = 30000  # of what bombs say that they are: 900 megapixels


def photo(height=20, width=30):
    y, x, c = np.mgrid[:height, :width, :3]
    return (120 + 100 * np.sin((x + 2 * y) / 7 + c)).astype(np.uint8)


def encoded(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(photo())).save(stream, kind, **options)
    return stream.getvalue()


def refusal(tmp_path, data):
    (tmp_path / 'a.bin').write_bytes(data)
    with pytest.raises(ImageError) as info:
        read_image(tmp_path / 'a.bin')
    message = str(info.value)
    assert message.startswith(f'{tmp_path}/a.bin: ') and '\n' not in message
    return message


# bombs


def header(width, height, depth=8, kind=0):
    return png_chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0))


def png(*chunks):
    return PNG_SIGNATURE + b''.join(chunks) + png_chunk(b'IEND', b'')


def pixels_chunk(data):
    return png_chunk(b'IDAT', zlib.compress(data, 9))


def jpeg(progressive, side=20000):
    data = bytearray(encoded('JPEG', progressive=progressive))
    place = data.index(b'\xff\xc2' if progressive else b'\xff\xc0')
    data[place + 5:place + 9] = struct.pack('>HH', side, side)
    return bytes(data)


def replaced(data, old, new):
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def webp(kind):
    if kind == 'extended':
        data = encoded('WEBP', exif=b'Exif\0\0II*\0\x08\0\0\0\0\0')
        place = data.index(b'VP8X') + 12
        return data[:place] + b'\xfe\x3f\0\xfe\x3f\0' + data[place + 6:]
    data = bytearray(encoded('WEBP', lossless=kind == 'lossless'))
    if kind == 'lossless':
        data[21:25] = struct.pack('<I', 16382 | 16382 << 14)
    else:
        data[26:30] = struct.pack('<HH', 16383, 16383)
    return bytes(data)


def tiff(strips, **tags):
    """Of SIDE x SIDE gray pixels, whose strips are said to be somewhere."""
    entries = {256: SIDE, 257: SIDE, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 1, 279: 4, **tags}
    data = struct.pack('<2sHIH', b'II', 42, 8, len(entries))
    for tag, value in sorted(entries.items()):
        data += struct.pack('<HHII', tag, 4, strips if tag in (273, 279) else 1, value)
    return data + struct.pack('<I', 0) + bytes(60)


def boxed(kind, pattern, side=SIDE):
    """JPEG 2000 or AVIF whose sizes are changed."""
    size, data = struct.pack('>II', *(20, 30) if kind == 'JPEG2000' else (30, 20)), encoded(kind)
    assert size in data
    data = data.replace(size, struct.pack('>II', side, side))
    return data.replace(struct.pack('>II', 30, 20), struct.pack('>II', side, side))


BOMBS = {
    'profile of PNG':
    lambda: png(header(4, 4), png_chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(2**25))), pixels_chunk(b'\0abcd' * 4)),
    'XMP of PNG':
    lambda: png(
        header(4, 4), png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(bytes(2**25))),
        pixels_chunk(b'\0abcd' * 4)),
    'PNG':
    lambda: png(header(SIDE, SIDE), pixels_chunk(b'\0abcd' * 4)),
    'PNG that could be, but is not':
    lambda: png(header(SIDE, SIDE),
                pixels_chunk(bytes(2**27)) + bytes(0), png_chunk(b'tEXt', b'a\0' + bytes(2**20))),
    'JPEG':
    lambda: jpeg(False),
    'progressive JPEG':
    lambda: jpeg(True),
    'WebP':
    lambda: webp('plain'),
    'lossless WebP':
    lambda: webp('lossless'),
    'extended WebP':
    lambda: webp('extended'),
    'GIF':
    lambda: replaced(encoded('GIF'), b'GIF87a\x1e\0\x14\0', b'GIF87a' + struct.pack('<HH', SIDE, SIDE)),
    'BMP':
    lambda: replaced(encoded('BMP'), struct.pack('<ii', 30, 20), struct.pack('<ii', SIDE, SIDE)),
    'PNM':
    lambda: b'P6 30000 30000 255\n' + bytes(100),
    'JPEG 2000':
    lambda: boxed('JPEG2000', b''),
    'AVIF':
    lambda: boxed('AVIF', b''),
    'TIFF of one strip':
    lambda: tiff(1),
    'TIFF without data':
    lambda: tiff(1, **{}).replace(struct.pack('<HHII', 279, 4, 1, 4), struct.pack('<HHII', 279, 4, 1, 0)),
    'TIFF of 2^28 strips':
    lambda: tiff(2**28),
    'TIFF of 2^28 rows':
    lambda: tiff(2**28).replace(struct.pack('<HHII', 257, 4, 1, SIDE), struct.pack('<HHII', 257, 4, 1, 2**28)),
    'uncompressed TIFF':
    lambda: tiff(1).replace(struct.pack('<HHII', 259, 4, 1, 8), struct.pack('<HHII', 259, 4, 1, 1)),
}


def peak_of_decoder():
    with open(f'/proc/{process._idle[-1].process.pid}/status') as file:
        return int(re.search(r'VmHWM:\s+(\d+)', file.read()).group(1)) / 1000


@pytest.mark.slow
@pytest.mark.parametrize('name', BOMBS)
def test_bombs_take_no_memory(name, tmp_path):
    data = BOMBS[name]()
    process._end_all()
    message = refusal(tmp_path, data)
    assert re.search('bytes are too few|unpacks to more|larger than|ends too soon|no data|broken|truncated',
                     message), message
    assert peak_of_decoder() < 250  # megabytes, of which libraries are 150


@pytest.mark.parametrize(
    'name',
    ['b03b_iccp_small_bomb.png', 'b04c_jpgprog20000.jpg', 'b10_tif_zerocount.tif', 'b11b_tif_manystrips_deflate.tif'])
def test_bombs_of_others(name, shared):
    path = shared(f'cases/{name}')
    with pytest.raises(ImageError, match='bytes are too few|unpacks to more|larger than'):
        read_image(path)
    assert peak_of_decoder() < 500


@pytest.mark.slow
def test_metadata_that_are_not_read_are_not_unpacked(tmp_path):
    text = png_chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(2**25)))
    (tmp_path / 'a.png').write_bytes(png(header(4, 4), text, pixels_chunk(b'\0abcd' * 4)))
    process._end_all()
    assert read_image(tmp_path / 'a.png').pixels.shape == (4, 4, 1)
    assert peak_of_decoder() < 250


def test_the_limit_of_megapixels(tmp_path):
    Image.fromarray(photo(1000, 1001)).save(tmp_path / 'a.png')
    assert read_image(tmp_path / 'a.png', 1.001).pixels.shape == (1000, 1001, 3)
    with pytest.raises(ImageError, match='a.png: 1001x1000 is larger than 1 megapixels, the limit'):
        read_image(tmp_path / 'a.png', 1)


@pytest.mark.slow
@pytest.mark.parametrize('kind,options', [('PNG', {}), ('PNG', {
    'bits': 1
}), ('JPEG', {}), ('JPEG', {
    'progressive': True
}), ('WEBP', {
    'lossless': True,
    'method': 0
}), ('GIF', {}), ('JPEG2000', {}), ('AVIF', {}), ('TIFF', {
    'compression': 'tiff_lzw'
}), ('TIFF', {
    'compression': 'group4'
})])
def test_white_pages_are_not_taken_for_bombs(kind, options, tmp_path):
    """4960x7016, A4 of 600 dpi; AVIF and JPEG 2000, which take long, of 150 dpi."""
    size = (1240, 1754) if kind in ('AVIF', 'JPEG2000') else (4960, 7016)
    bits = options.get('compression') == 'group4' or 'bits' in options
    Image.new('1' if bits else 'L', size, 1 if bits else 255).save(tmp_path / 'a', kind, **options)
    pixels = read_image(tmp_path / 'a').pixels
    assert pixels.shape[:2] == size[::-1] and pixels.min() == 255


# PNG


def animated(order=(b'acTL', b'fcTL', b'IDAT', b'fcTL', b'fdAT')):
    frames = [Image.fromarray(photo()), Image.fromarray(255 - photo())]
    return encoded('PNG', frames[0], save_all=True, append_images=frames[1:], duration=50)


def split(data):
    """Chunks of a PNG, as name and content."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place:place + 4], 'big')
        chunks.append((data[place + 4:place + 8], data[place + 8:place + 8 + length]))
        place += 12 + length
    return chunks


def joined(chunks):
    return PNG_SIGNATURE + b''.join(png_chunk(name, body) for name, body in chunks)


def test_an_animation_is_its_first_frame_whatever_its_other_chunks_are(tmp_path):
    chunks = split(animated())
    assert [name for name, _ in chunks].count(b'fdAT') >= 1
    rng = np.random.default_rng(0)
    for number in range(60):
        broken = []
        for name, body in chunks:
            if name in (b'acTL', b'fcTL', b'fdAT'):
                body = bytearray(body)
                choice = rng.integers(4)
                if choice == 0:
                    body[rng.integers(len(body))] = rng.integers(256)
                elif choice == 1:
                    body = body[:rng.integers(len(body))]
                elif choice == 2:
                    broken.append((name, bytes(body)))
            broken.append((name, bytes(body)))
        names = [name for name, _ in broken]
        if number % 3 == 0:  # out of order
            place = names.index(b'fdAT')
            broken.insert(1, broken.pop(place))
        (tmp_path / 'a.png').write_bytes(joined(broken))
        assert np.array_equal(read_image(tmp_path / 'a.png').pixels, photo())


def test_animations_that_crashed_a_decoder(shared):
    for name in ('apng_fdat0_segfault.png', 'apng_segfault_11.png', 'prepare_segfault_zune_1.png'):
        with pytest.raises(ImageError, match='broken'):
            read_image(shared(f'cases/{name}'))


WRONG = {
    'a second header':
    lambda chunks: [*chunks[:1], *chunks],
    'a header at the end':
    lambda chunks: [*chunks[1:-1], chunks[0], chunks[-1]],
    'no pixels':
    lambda chunks: [chunk for chunk in chunks if chunk[0] != b'IDAT'],
    'no palette':
    lambda chunks: [chunk for chunk in chunks if chunk[0] != b'PLTE'],
    'two palettes':
    lambda chunks: [chunks[0], chunks[1], *chunks[1:]],
    'a palette behind':
    lambda chunks: [chunks[0], *chunks[2:-1], chunks[1], chunks[-1]],
    'a palette of 4 bytes':
    lambda chunks: [chunks[0], (b'PLTE', b'abcd'), *chunks[2:]],
    'a palette of 257 colours':
    lambda chunks: [chunks[0], (b'PLTE', bytes(3 * 257)), *chunks[2:]],
    'more transparent colours than colours':
    lambda chunks: [*chunks[:2], (b'tRNS', bytes(200)), *chunks[2:]],
    'a chunk that nobody knows':
    lambda chunks: [*chunks[:2], (b'ABCD', b''), *chunks[2:]],
    'interrupted pixels':
    lambda chunks:
    [*chunks[:2], (b'IDAT', chunks[2][1][:9]), (b'tEXt', b'a\0b'), (b'IDAT', chunks[2][1][9:]), chunks[-1]],
    'a header of 12 bytes':
    lambda chunks: [(b'IHDR', chunks[0][1][:12]), *chunks[1:]],
    'a width of 0':
    lambda chunks: [(b'IHDR', bytes(4) + chunks[0][1][4:]), *chunks[1:]],
    'a compression that there is not':
    lambda chunks: [(b'IHDR', chunks[0][1][:10] + b'\1\0\0'), *chunks[1:]],
    'an interlacing that there is not':
    lambda chunks: [(b'IHDR', chunks[0][1][:12] + b'\2'), *chunks[1:]],
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_structures_are_refused(name, tmp_path):
    chunks = split(encoded('PNG', Image.fromarray(photo()).quantize(20)))
    assert [name for name, _ in chunks] == [b'IHDR', b'PLTE', b'IDAT', b'IEND']
    refusal(tmp_path, joined(WRONG[name](chunks)))


def test_pixels_may_come_in_many_chunks_and_palettes_be_superfluous(tmp_path):
    first, pixels, last = split(encoded('PNG'))
    parts = [(b'IDAT', pixels[1][at:at + 50]) for at in range(0, len(pixels[1]), 50)]
    (tmp_path / 'a.png').write_bytes(joined([first, (b'PLTE', bytes(9)), *parts, (b'IDAT', b''), last]))
    assert np.array_equal(read_image(tmp_path / 'a.png').pixels, photo())


def test_text_with_a_wrong_checksum_leaves_the_pixels_whole(tmp_path):
    data = encoded('PNG')
    text = bytearray(png_chunk(b'tEXt', b'Comment\0abc'))
    text[-1] ^= 1
    (tmp_path / 'a.png').write_bytes(data[:33] + text + data[33:])
    assert np.array_equal(read_image(tmp_path / 'a.png').pixels, photo())


# other kinds


def test_kinds_that_hold_hdr_values_are_refused_by_name(tmp_path):
    import cv2
    values = np.linspace(0, 10, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
    assert cv2.imwrite(str(tmp_path / 'a.hdr'), values) and cv2.imwrite(str(tmp_path / 'a.pfm'), values)
    (tmp_path / 'a.exr').write_bytes(b'\x76\x2f\x31\x01' + bytes(100))
    hdr_png = encoded('PNG')
    (tmp_path / 'a.png').write_bytes(hdr_png[:33] + png_chunk(b'cICP', b'\x09\x10\0\1') + hdr_png[33:])
    for kind in ('hdr', 'pfm', 'exr', 'png'):
        with pytest.raises(ImageError, match=f'a.{kind}: contains HDR values'):
            read_image(tmp_path / f'a.{kind}')


def test_gif_with_and_without_transparency(tmp_path):
    palette = Image.fromarray(photo()).quantize(20)
    colors, indices = np.asarray(palette.convert('RGB')), np.asarray(palette)
    palette.save(tmp_path / 'a.gif')
    assert np.array_equal(read_image(tmp_path / 'a.gif').pixels, colors)
    palette.save(tmp_path / 'b.gif', transparency=3)
    pixels = read_image(tmp_path / 'b.gif').pixels
    assert np.array_equal(pixels[..., 3], np.where(indices == 3, 0, 255))
    assert np.array_equal(pixels[..., :3][indices != 3], colors[indices != 3])


@pytest.mark.parametrize('white', [1, 7, 255, 256, 1000, 65535])
@pytest.mark.parametrize('channels', [1, 3])
def test_pnm_of_every_depth(white, channels, tmp_path):
    values = np.random.default_rng(0).integers(0, white, (11, 7, channels), endpoint=True)
    head = f'P{5 if channels == 1 else 6}\n# made by rule\n7 11\n{white}\n'.encode()
    (tmp_path / 'a.pnm').write_bytes(head + values.astype('u1' if white < 256 else '>u2').tobytes())
    full = 255 if white < 256 else 65535
    pixels = read_image(tmp_path / 'a.pnm').pixels
    assert pixels.dtype == ('uint8' if white < 256 else 'uint16')
    assert np.array_equal(pixels, np.round(values * (full / white)))
    (tmp_path / 'a.pnm').write_bytes((tmp_path / 'a.pnm').read_bytes()[:-1])
    with pytest.raises(ImageError):
        read_image(tmp_path / 'a.pnm')


@pytest.mark.parametrize('kind', ['JPEG2000', 'AVIF', 'GIF', 'SUN', 'PPM', 'BMP', 'HEIF', 'JXL'])
def test_kinds_are_told_by_content(kind, tmp_path):
    if kind == 'SUN':
        data = struct.pack('>8I', 0x59a66a95, 30, 20, 24, 1800, 1, 0, 0) + photo()[..., ::-1].tobytes()
    else:
        for name, format in (('pillow_heif', 'HEIF'), ('pillow_jxl', 'JXL')):
            if kind == format:
                module = pytest.importorskip(name)
                getattr(module, 'register_heif_opener', int)()
        options = {
            'JPEG2000': dict(irreversible=False),
            'AVIF': dict(quality=100, subsampling='4:4:4'),
            'JXL': dict(lossless=True),
            'HEIF': dict(quality=-1)
        }
        data = encoded(kind, **options.get(kind, {}))
    (tmp_path / 'a').write_bytes(data)
    assert kind_of(data[:64]) == {'PPM': 'PNM'}.get(kind, kind)
    off = np.abs(read_image(tmp_path / 'a').pixels.astype(int) - photo()).mean()
    assert off <= {'AVIF': 3, 'HEIF': 9, 'GIF': 9}.get(kind, 0)


@pytest.mark.slow
@pytest.mark.parametrize('kind,package', [('HEIF', 'pillow-heif'), ('JXL', 'pillow-jxl-plugin')])
def test_what_needs_another_package_says_so(kind, package, tmp_path, monkeypatch):
    blocked = f"import sys; sys.modules['pillow_heif'] = sys.modules['pillow_jxl'] = None; {process.PROGRAM}"
    monkeypatch.setattr(process, 'PROGRAM', blocked)
    process._end_all()
    start = {'HEIF': b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'JXL': b'\xff\x0a'}[kind]
    message = refusal(tmp_path, start + bytes(100))
    assert f'{kind} is read by {package}, which is not installed; pip install' in message and '[formats]' in message
    process._end_all()


@pytest.mark.slow
def test_further_frames_and_pages_are_noted(tmp_path):
    frames = [Image.fromarray(np.roll(photo(), shift, axis=1)) for shift in (0, 9, 18)]
    for name, options in (('a.png', {}), ('a.webp', dict(lossless=True)), ('a.gif', {}), ('a.tif', {}),
                          ('a.jpg', dict(format='MPO')), ('a.avif', {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        unit = 'pages' if name == 'a.tif' else 'frames'
        assert read_image(tmp_path / name).notes == (f'only the first of 3 {unit}', ), name
    frames[0].save(tmp_path / 'b.png')
    assert read_image(tmp_path / 'b.png').notes == ()


def test_colours_that_are_cut_down_to_8_bits_are_noted(tmp_path):
    import imagecodecs
    deep = photo().astype(np.uint16)
    (tmp_path / 'a.jp2').write_bytes(imagecodecs.jpeg2k_encode(deep * 257, level=0))
    (tmp_path / 'a.avif').write_bytes(imagecodecs.avif_encode(deep * 4, bitspersample=10))
    assert read_image(tmp_path / 'a.jp2').notes == ('only 8 of its 16 bits', )
    assert read_image(tmp_path / 'a.avif').notes == ('only 8 of its 10 bits', )
    pytest.importorskip('pillow_jxl')
    (tmp_path / 'a.jxl').write_bytes(imagecodecs.jpegxl_encode(deep * 257))
    assert read_image(tmp_path / 'a.jxl').notes == ('only 8 of its 16 bits', )


def test_all_photographs_at_hand_are_read_as_pillow_reads_them(shared):
    for path in sorted(shared('data/photos512').glob('*.webp'))[:8] + sorted(
            shared('data/benchmark/Set5/HR').iterdir()):
        with Image.open(path) as image:
            expected = np.asarray(image)
        assert np.array_equal(read_image(path).pixels, expected.reshape(*expected.shape[:2], -1))
