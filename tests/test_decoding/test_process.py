"""What a decoder does costs one image; none is left over."""
import numpy as np
import os
import pytest
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from PIL import Image

from cdnsr_basicsr.decoding import process
from cdnsr_basicsr.inference.image_io import ImageError, read_image

# a decoder that is harmed by files of some lengths
HARMED = process.PROGRAM.replace(
    'serve()', '''
import os, signal
from cdnsr_basicsr.decoding import formats, process
original = formats.read_header
process.CPU_SECONDS = 1
def read_header(file, *args):
    size = os.fstat(file.fileno()).st_size
    if size == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if size == 2:
        os.abort()
    if size == 3:
        while True:
            pass
    if size == 4:
        bytearray(2**40)
    if size == 5:
        os._exit(3)
    return original(file, *args)
formats.read_header = read_header
serve()''')


@pytest.fixture
def fresh(monkeypatch):
    """Decoders of this test alone."""
    process._end_all()
    yield
    process._end_all()


@pytest.fixture
def good(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'good.png')
    return tmp_path / 'good.png', pixels


@pytest.mark.slow
@pytest.mark.parametrize('length,reason', [(1, r'crashes its decoder \(SIGSEGV\)'),
                                           (2, r'crashes its decoder \(SIGABRT\)'), (3, 'takes more than .* to decode'),
                                           (4, 'takes too much memory'), (5, r'crashes its decoder \(exit code 3\)')])
def test_what_harms_a_decoder_costs_one_image(length, reason, fresh, good, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(process, 'PROGRAM', HARMED)
    path, pixels = good
    (tmp_path / 'bad.png').write_bytes(b'x' * length)
    with pytest.raises(ImageError, match=f'bad.png: .*{reason}'):
        read_image(tmp_path / 'bad.png')
    assert np.array_equal(read_image(path).pixels, pixels)
    assert capfd.readouterr() == ('', '')


@pytest.mark.slow
def test_threads_have_decoders_of_their_own(fresh, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 30, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f'{number}.png')
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read_image, [tmp_path / f'{number}.png' for number in range(40)]))
    assert all(np.array_equal(result.pixels, image) for result, image in zip(results, pixels))
    assert 1 <= len({decoder.process.pid for decoder in process._idle}) <= 4


@pytest.mark.slow
def test_an_interrupted_reader_does_not_mix_up_replies(fresh, good, tmp_path, monkeypatch):
    path, pixels = good
    other = tmp_path / 'other.png'
    Image.fromarray(255 - pixels).save(other)
    read_image(path)
    pid, original = process._idle[0].process.pid, process.socket.recv_fds

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(process.socket, 'recv_fds', interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_image(other)
    monkeypatch.setattr(process.socket, 'recv_fds', original)
    assert np.array_equal(read_image(path).pixels, pixels)
    assert process._idle[0].process.pid != pid


@pytest.mark.slow
def test_a_decoder_that_died_between_two_images_is_replaced(fresh, good):
    path, pixels = good
    read_image(path)
    os.kill(process._idle[0].process.pid, signal.SIGKILL)
    process._idle[0].process.wait()
    assert np.array_equal(read_image(path).pixels, pixels)


def is_gone(pid):
    """Also a zombie that nobody waits for here counts as gone."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] == 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
@pytest.mark.parametrize('end', ['pass', 'os._exit(0)', 'os.kill(os.getpid(), signal.SIGKILL)', 'sys.exit(3)'])
def test_decoders_end_with_the_program(end, good, tmp_path):
    # a program that is no module, has no guard, and is started elsewhere
    program = f'''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from cdnsr_basicsr.decoding.process import _idle, decode
assert 'torch' not in sys.modules
with open(sys.argv[2], 'rb') as file:
    decode(file, 10**6)
print(_idle[0].process.pid, flush=True)
{end}'''
    root = os.path.dirname(os.path.dirname(os.path.dirname(process.__file__)))
    run = subprocess.run([sys.executable, '-c', program, root, good[0]], cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr == ''
    for _ in range(100):
        if is_gone(int(run.stdout)):
            break
        time.sleep(0.1)
    assert is_gone(int(run.stdout))


@pytest.mark.slow
def test_a_forked_process_starts_its_own(fresh, good):
    path, pixels = good
    read_image(path)
    child = os.fork()
    if child == 0:
        right = np.array_equal(read_image(path).pixels, pixels)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(read_image(path).pixels, pixels)


@pytest.mark.slow
def test_no_thread_is_needed_in_the_parent(fresh, good):
    before = threading.active_count()
    read_image(good[0])
    assert threading.active_count() == before
