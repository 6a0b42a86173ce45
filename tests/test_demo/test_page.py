"""The page in a real browser: what visitors do, and what is left when they have gone."""
import cv2
import numpy as np
import os
import pytest
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cdnsr_basicsr import cli
from cdnsr_basicsr.demo import server
from tests.helpers import ENV, photograph

pytestmark = pytest.mark.slow
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """What the command tells Gradio by the environment ends with the test."""
    for name in ('GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED', 'HF_HUB_DISABLE_TELEMETRY'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)


def test_without_gradio_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert cli.main(['demo', '--no-browser']) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and "pip install 'cdnsr-basicsr[demo]'" in said


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """The page's address, and the folder for all temporary files of its server, which has ended well in the end."""
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('demo')
    temporary = folder / 'temporary'
    temporary.mkdir()
    env = dict(
        ENV, TMPDIR=str(temporary), XDG_CACHE_HOME=str(tmp_path_factory.getbasetemp() / 'cache'), PYTHONUNBUFFERED='1')
    command = [
        sys.executable, '-m', 'cdnsr_basicsr', 'demo', '-m', 'cdnsr-fsrcnn-x4', '--no-browser', '--device', 'cpu'
    ]
    process = subprocess.Popen([*command, '--max-megapixels', '1', '--max-megabytes', '1'],
                               env=env,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    said = ''
    while 'The page is at' not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    yield re.search(r'http://127\.0\.0\.1:\d+/', said).group(), temporary
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, process.stdout.read()
    # torch and Gradio make folders there, too, which stay empty
    assert [path for path in temporary.rglob('*') if path.is_file() or path.name.startswith('basicsr')] == []


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=path, args=['--no-sandbox'] if os.geteuid() == 0 else [])
        except playwright.Error as error:
            pytest.skip(f'no browser: {error.message.splitlines()[0]}')
        yield opened
        opened.close()


@pytest.fixture
def page(served, browser):
    """A visitor's page; it has asked nobody but its server for anything, and no script has failed."""
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    opened, asked, failed = context.new_page(), [], []
    opened.set_default_timeout(60000)
    opened.on('request', lambda request: asked.append(request.url))
    opened.on('pageerror', lambda error: failed.append(str(error)))
    opened.goto(served[0])
    opened.wait_for_selector('#viewer .stage.blank')
    yield opened
    context.close()
    assert [url for url in asked if not url.startswith((served[0], 'data:', 'blob:'))] == [] == failed


def put(path, height, width, dtype=np.uint8):
    cv2.imwrite(str(path), photograph(height, width).astype(dtype) * (257 if dtype == np.uint16 else 1))
    return path


def give(page, path):
    page.set_input_files('#upload input[type=file]', str(path))


def wait_until_done(page, name):
    page.wait_for_selector(f'#status :text("{name}"):text("measured")')


def numbers(page):
    """What the page says that a decision costs."""
    return page.inner_text('#numbers dl')


def source(page, layer):
    return page.get_attribute(f'#viewer {layer}', 'src')


def test_an_image_is_decided_on_at_once_upscaled_and_downloaded(page, tmp_path):
    image = put(tmp_path / 'my photo.png', 250, 330, np.uint16)
    assert page.is_disabled('#download')
    give(page, image)
    page.wait_for_selector('#numbers dl')
    wait_until_done(page, 'photo.png')
    first, before, drawn = numbers(page), source(page, '.after .coarse'), source(page, '.map')
    assert 'Time, estimated' in first and 'Operations' in first and 'hardest' in page.inner_text('#numbers ul')

    # by the keyboard: the numbers and the map change at once, the pixels when the slider rests
    slider = page.locator('#budget input[type=range]')
    slider.focus()
    for _ in range(30):
        page.keyboard.press('ArrowRight')
    value = float(slider.input_value())
    assert value == pytest.approx(0.8)
    page.wait_for_function('old => document.querySelector("#viewer .map").src !== old', arg=drawn)
    page.wait_for_function('old => document.querySelector("#numbers dl").innerText !== old', arg=first)
    page.wait_for_function('old => !document.querySelector("#viewer .after .coarse").src.endsWith(old)', arg=before)
    wait_until_done(page, 'photo.png')
    with page.expect_download() as download:
        page.click('#download')
    out = tmp_path / 'out'
    command = ['upscale', '-m', 'cdnsr-fsrcnn-x4', '-i', str(image), '-o', str(out), '--budget', str(value)]
    assert cli.main([*command, '--device', 'cpu']) == 0
    expected = next(out.iterdir())
    assert cv2.imread(str(expected), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    assert Path(download.value.path()).read_bytes() == expected.read_bytes()
    assert download.value.suggested_filename == expected.name


def test_what_cannot_be_read_is_said_and_the_page_goes_on(page, tmp_path):
    good = put(tmp_path / 'good.png', 60, 80)
    broken, large, heavy = (tmp_path / name for name in ('broken.png', 'large.png', 'heavy.png'))
    broken.write_bytes(good.read_bytes()[:-40])
    cv2.imwrite(str(large), np.zeros((1001, 1000, 3), np.uint8))
    heavy.write_bytes(os.urandom(1100000))
    for path, reason in ((broken, 'truncated PNG'), (large, '1000x1001 is larger than 1 megapixels')):
        give(page, path)
        page.wait_for_selector(f'#wrong [role=alert]:text("{reason}")')
        assert path.name in page.inner_text('#wrong') and str(tmp_path) not in page.inner_text('#wrong')
    give(page, heavy)
    page.wait_for_selector('text=/maximum|exceeds|too large/i')
    give(page, good)
    wait_until_done(page, 'good.png')
    assert not page.is_visible('#wrong [role=alert]') and page.is_enabled('#download')


def test_long_work_can_be_stopped_and_begun_again(page, tmp_path):
    give(page, put(tmp_path / 'long.jpg', 990, 1000))
    page.wait_for_selector('#status progress')
    page.click('#cancel')
    page.wait_for_selector('#status :text("Stopped")')
    assert page.is_disabled('#download') and not page.is_visible('#cancel')
    page.click('#run')
    page.wait_for_selector('#status :text("Upscaling")')
    wait_until_done(page, 'long.jpg')
    assert page.is_enabled('#download') and not page.is_visible('#run')


def test_the_viewer_goes_by_keyboard_and_shows_every_pixel(page, tmp_path):
    page.focus('#examples button >> nth=1')
    page.keyboard.press('Enter')
    wait_until_done(page, 'chelsea.png')
    handle = page.locator('#viewer .handle')
    handle.focus()
    page.keyboard.press('ArrowRight')
    assert handle.get_attribute('aria-valuenow') == '52'
    page.keyboard.press('Home')
    assert handle.get_attribute('aria-valuenow') == '0' and 'after' in handle.get_attribute('aria-valuetext')
    box = page.locator('#viewer .stage').bounding_box()
    page.mouse.move(box['x'] + 3, box['y'] + 50)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width'] / 4, box['y'] + 60)
    page.mouse.up()
    assert handle.get_attribute('aria-valuenow') == '25'
    fade = page.locator('#viewer .fade input')
    fade.focus()
    for _ in range(8):
        page.keyboard.press('ArrowRight')
    assert page.evaluate('getComputedStyle(document.querySelector("#viewer .map")).opacity') == '0.4'
    page.focus('#viewer .to-full')
    page.keyboard.press('Enter')
    page.wait_for_selector('#viewer .after .fine[src^="data:image/png"]')
    shown = page.evaluate("""() => {
        const image = document.querySelector('#viewer .after .fine');
        return [image.naturalWidth / image.getBoundingClientRect().width, image.style.left];
    }""")
    assert shown[0] == pytest.approx(1, abs=0.01)
    page.focus('#viewer .stage')
    page.keyboard.press('ArrowRight')
    page.wait_for_function('old => document.querySelector("#viewer .after .fine").style.left !== old', arg=shown[1])


def test_other_settings_change_what_there_is_to_choose(page, tmp_path):
    give(page, put(tmp_path / 'a.png', 120, 150))
    wait_until_done(page, 'a.png')
    page.click('#engine input >> nth=0')
    page.click('text=cdnsr-etds-x4')
    page.wait_for_selector('#viewer .tag.right:text("cdnsr-etds-x4")')
    page.click('#limits label:has-text("Loss")')
    page.wait_for_selector('#max_loss input[type=range]')
    assert not page.is_visible('#budget')
    first = page.inner_text('#numbers dl')
    page.fill('#max_loss input[type=number]', '1.5')
    page.keyboard.press('Tab')
    page.wait_for_function('old => document.querySelector("#numbers dl").innerText !== old', arg=first)
    assert 'Loss, predicted' in numbers(page)


def test_it_fits_a_phone(served, browser, tmp_path):
    context = browser.new_context(viewport=dict(width=390, height=844), is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(served[0])
    page.wait_for_selector('#viewer .stage.blank')
    page.tap('#examples button >> nth=0')
    page.set_default_timeout(60000)
    wait_until_done(page, 'astronaut.png')
    page.tap('#viewer .to-full')
    page.wait_for_selector('#viewer .after .fine[src^="data:image/png"]')
    widths = page.evaluate("""() => [...document.querySelectorAll('#viewer, #limits, #numbers, #download, #engine')]
        .map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])""")
    assert len(widths) >= 5 and all(0 <= left < right <= 390 for left, right in widths)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    context.close()


def test_nothing_is_kept_of_a_visitor_who_has_gone(served, browser, tmp_path):
    root = next(served[1].glob('basicsr-demo-*'))

    def kept():
        return [path for path in root.rglob('*') if path.is_file()]

    deadline = time.monotonic() + 30  # for the visitors of the other tests
    while kept() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kept() == []
    context = browser.new_context()
    page = context.new_page()
    page.goto(served[0])
    page.wait_for_selector('#viewer .stage.blank')
    give(page, put(tmp_path / 'private.png', 60, 80))
    wait_until_done(page, 'private.png')
    names = {path.name for path in kept()}
    assert 'private.png' in names and len(names) >= 3
    context.close()
    while kept() and time.monotonic() < deadline + 30:
        time.sleep(0.2)
    assert kept() == []


def test_what_is_loaded_first_is_said_in_one_line_where_it_is_wrong(capsys):
    pytest.importorskip('gradio')
    assert cli.main(['demo', '-m', 'nonesuch', '--no-browser']) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'nonesuch' in said


def test_a_port_that_cannot_be_had_is_said_in_one_line(served, capsys):
    port = re.search(r':(\d+)/', served[0]).group(1)
    for number, reason in ((port, 'in use'), ('70000', 'expected a port up to 65535')):
        assert cli.main(['demo', '-m', 'cdnsr-fsrcnn-x4', '--no-browser', '--device', 'cpu', '--port', number]) == 2
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and f'--port {number}: ' in said and reason in said


def test_defaults_are_careful():
    assert server.HOST == '127.0.0.1' and server.MEGAPIXELS <= 16 and server.MEGABYTES <= 100
