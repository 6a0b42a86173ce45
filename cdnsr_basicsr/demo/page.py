"""The page: its layout, and its reactions to what a visitor does. Needs Gradio."""
from __future__ import annotations

import gradio as gr
import importlib.util
import numpy as np
import torch
from html import escape
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

from ..inference import TileUpscaler, Upscaler
from ..inference.difficulty_map import class_colors
from ..inference.image_io import ImageError, read_image
from ..options import OptionError, one_line
from ..settings import PRECISIONS, Settings
from . import views
from .session import Decision, Engines, Session, Sessions, Stopped

HERE = Path(__file__).parent
# of scikit-image, which comes with BasicSR; NASA's are in the public domain, the others CC0
EXAMPLES = {
    'astronaut.png': 'an astronaut',
    'chelsea.png': 'a cat',
    'coffee.png': 'a cup of coffee',
    'rocket.jpg': 'a rocket'
}
CREDIT = 'From scikit-image: NASA (public domain), CC0.'
CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('select', { name: button.value });
});
"""
# system's fonts, for which nothing is fetched
THEME = gr.themes.Default(
    primary_hue='indigo',
    neutral_hue='slate',
    font=['system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace'],
    radius_size='md').set(
        body_text_color_subdued='*neutral_500', block_info_text_color='*neutral_500')
NO_LIMIT = 'none'
LIMITS = {'budget': 'Budget', 'max_loss': 'Loss', 'fidelity': 'Fidelity', NO_LIMIT: 'None'}
BUSY, NOTHING = 'Waiting: another image is being upscaled', 'Choose an image, or drop one.'


class Limits(NamedTuple):
    """What an upload may be at most."""
    megabytes: float
    megapixels: float


class Page:
    """The page of all visitors.

    Args:
        models: Names or paths of the models to choose from, the first of them first.
        device: The device that is taken at first.
        limits: Of uploads.
        root: An empty folder for the visitors' files.
    """

    def __init__(self, models: Sequence[str], device: str, limits: Limits, root: Path) -> None:
        self.models, self.device, self.limits = list(models), device, limits
        self.engines = Engines()
        self.sessions = Sessions(root, self.engines)
        self.examples = examples()

    def build(self) -> gr.Blocks:
        """Lays the page out."""
        first = self.engines.get(self.models[0], Settings.precision, self.device)
        with gr.Blocks(title='basicsr demo', analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.HTML(TITLE, elem_id='title')
            with gr.Row(elem_id='columns'):
                with gr.Column(scale=1, min_width=280, elem_id='side'):
                    self.upload = gr.File(label=upload_label(self.limits), height=160, elem_id='upload')
                    self.wrong = gr.HTML(visible=False, elem_id='wrong')
                    self.choice = gr.HTML(
                        example_buttons(self.examples), js_on_load=CHOOSE, apply_default_css=False, elem_id='examples')
                    with gr.Group(elem_id='limits'):
                        self.limit = gr.Radio(label='Limit', **radio(first, 'budget'))
                        self.sliders = sliders(first)
                    with gr.Group(elem_id='engine'):
                        names = [(name_of(model), model) for model in self.models]
                        self.model = gr.Dropdown(names, value=self.models[0], label='Model', filterable=False)
                        with gr.Row():
                            self.precision = gr.Dropdown(
                                list(PRECISIONS),
                                value=Settings.precision,
                                label='Precision',
                                filterable=False,
                                min_width=120)
                            self.on = gr.Dropdown(
                                devices(self.device),
                                value=self.device,
                                label='Device',
                                filterable=False,
                                min_width=120)
                with gr.Column(scale=3, min_width=300, elem_id='main'):
                    self.viewer = gr.HTML(
                        html_template=read('viewer.html'),
                        css_template=read('viewer.css'),
                        js_on_load=read('viewer.js'),
                        server_functions=[part_of(self.sessions)],
                        apply_default_css=False,
                        elem_id='viewer')
                    with gr.Row(elem_id='actions'):
                        self.status = gr.HTML(status(NOTHING), elem_id='status', min_width=200)
                        self.run = gr.Button('Upscale', visible=False, scale=0, elem_id='run')
                        self.cancel = gr.Button('Cancel', visible=False, variant='stop', scale=0, elem_id='cancel')
                        self.download = gr.DownloadButton(
                            'Download', variant='primary', interactive=False, scale=0, elem_id='download')
                    self.numbers = gr.HTML('', apply_default_css=False, elem_id='numbers')
            self._connect(blocks)
        return blocks

    def _connect(self, blocks: gr.Blocks) -> None:
        """Connects events with their handlers."""
        chosen = [self.model, self.precision, self.on, self.limit, *self.sliders.values()]
        quiet: dict[str, Any] = dict(show_progress='hidden', concurrency_limit=None, api_visibility='private')
        decided = [self.viewer, self.status, self.numbers, self.limit, *self.sliders.values(), self.download, self.run]
        computed = [self.viewer, self.status, self.numbers, self.download, self.run, self.cancel]
        opened = [
            # what is uploaded is taken as Gradio has stored it, under its own name
            self.upload.upload(
                self.open_upload, self.upload, [self.upload, self.wrong, self.status], preprocess=False, **quiet),
            self.choice.select(self.open_example, None, [self.wrong, self.status], **quiet)
        ]
        changed = [one.input for one in (self.model, self.precision, self.on, self.limit, *self.sliders.values())]
        decisions = [event.then(self.decide, chosen, decided, **quiet) for event in opened]
        decisions += [gr.on(changed, self.decide, chosen, decided, trigger_mode='always_last', **quiet)]
        for decision in decisions:
            decision.then(self.compute, None, computed, trigger_mode='always_last', **quiet)
        self.run.click(self.resume, None, None, **quiet).then(self.compute, None, computed, **quiet)
        self.cancel.click(self.stop, None, None, **quiet)
        blocks.unload(self.leave)

    # what visitors do

    def session_of(self, request: gr.Request) -> Session:
        """The visitor's session; what still arrives of one that has ended is dropped."""
        try:
            return self.sessions.of(str(request.session_hash))
        except Stopped as error:
            raise gr.Error('This visit has ended; load the page again.', print_exception=False) from error

    def open_upload(self, file: Any, request: gr.Request) -> tuple[Any, Any, Any]:
        """Reads a file that was uploaded; if it cannot be read, the reason is shown, and the current image stays."""
        session = self.session_of(request)
        path = self.sessions.uploaded(file['path']) if isinstance(file, dict) else None
        if path is None:
            return None, wrong('The upload failed; choose the file again.'), gr.skip()
        return (None, *self._open(session, path, move=True))

    def open_example(self, event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
        """Reads one of the examples."""
        path, session = self.examples.get(str(event.name)), self.session_of(request)
        return (gr.skip(), gr.skip()) if path is None else self._open(session, path, move=False)

    def _open(self, session: Session, path: Path, move: bool) -> tuple[Any, Any]:
        """Reads a file, and says what is wrong with it or goes on."""
        try:
            session.open(path, path.name, self.limits.megapixels, move)
        except (ImageError, OSError, MemoryError) as error:
            return wrong(f'{path.name}: {reason(error, path.name)}'), gr.skip()
        return gr.update(visible=False), status('Reading the image', 0.)

    def decide(self, model: str, precision: str, device: str, limit: str, budget: float, max_loss: float,
               fidelity: float, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Routes the image by the settings on the page."""
        session = self.session_of(request)
        if not self.engines.has(model, precision, device):
            yield {self.status: status(f'Loading {name_of(model)}, and measuring its speed', 0.)}
        try:
            engine = self.engines.get(model, precision, device)
        except (OptionError, RuntimeError, MemoryError) as error:
            yield {self.status: alert(one_line(error))}
            return
        limit = limit if limit in limits_of(engine) else limits_of(engine)[0]
        values = dict(budget=budget, max_loss=max_loss, fidelity=fidelity)
        try:
            different = session.decide(engine, model, None if limit == NO_LIMIT else limit, values.get(limit, 0.))
        except (ValueError, RuntimeError, MemoryError) as error:
            yield {self.status: alert(one_line(error))}
            return
        shown: dict[Any, Any] = {self.limit: gr.update(**radio(engine, limit))}
        shown.update({slider: gr.update(visible=name == limit) for name, slider in self.sliders.items()})
        shown.update({self.numbers: self.costs(session), self.viewer: view(session)})
        if different:
            shown.update({self.run: gr.update(visible=False), self.download: gr.update(interactive=not session.stale)})
        yield shown

    def compute(self, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Upscales the image as decided, once nothing has changed for a moment."""
        session = self.session_of(request)
        try:
            for share in session.upscale():
                text = 'Upscaling' if share is not None else BUSY
                yield {
                    self.status: status(text, share or 0.),
                    self.cancel: gr.update(visible=True),
                    self.run: gr.update(visible=False)
                }
        except Stopped:
            said = status('Stopped. Change a setting or press the button to start again.')
            yield {self.status: said, self.cancel: gr.update(visible=False), self.run: gr.update(visible=True)}
            return
        except (ImageError, OSError, RuntimeError, MemoryError) as error:
            said = alert(f'It failed: {reason(error, session.source.name)}')
            yield {self.status: said, self.cancel: gr.update(visible=False), self.run: gr.update(visible=True)}
            return
        result = session.result
        if result is None or session.stale:  # nobody has asked for anything, or something else is wanted by now
            yield {self.cancel: gr.update(visible=False)}
            return
        yield {
            self.viewer: view(session),
            self.status: status(done(session)),
            self.numbers: self.costs(session),
            self.download: gr.update(value=str(result.file), interactive=True),
            self.run: gr.update(visible=False),
            self.cancel: gr.update(visible=False)
        }

    def costs(self, session: Session) -> str:
        """The cost of the current decision, in numbers."""
        decision, result = session.decision, session.result
        if decision is None:
            return ''
        plan = result.plan if decision.plan is None and result is not None else decision.plan
        return numbers(decision, plan, self.engines.pace.get(decision.engine.net, 1.))

    def stop(self, request: gr.Request) -> None:
        self.session_of(request).stop()

    def resume(self, request: gr.Request) -> None:
        self.session_of(request).resume()

    def leave(self, request: gr.Request) -> None:
        self.sessions.end(request.session_hash)


TITLE = """<h1>Difficulty-routed super-resolution</h1>
<p>Every tile of the image goes to the cheapest branch that upscales it well. Move the limit to see the cost.</p>"""


def read(name: str) -> str:
    return (HERE / name).read_text(encoding='utf-8')


def name_of(model: str) -> str:
    """A model as the page calls it."""
    return Path(model).stem if Path(model).suffix in ('.pth', '.safetensors') else Path(model).name


def devices(first: str) -> list[str]:
    """The devices to choose from."""
    return list(dict.fromkeys([first, 'cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]))


def upload_label(limits: Limits) -> str:
    return f'Image, up to {limits.megapixels:g} megapixels and {limits.megabytes:g} MB'


def limits_of(engine: Upscaler) -> list[str]:
    """The limits that an engine knows; the last one is none at all."""
    if not engine.routed:
        return [NO_LIMIT]
    reference = engine.reference if isinstance(engine, TileUpscaler) else None
    by_errors = {None: [], 'gt': ['max_loss'], 'hardest': ['fidelity']}[reference]
    return ['budget', *by_errors, NO_LIMIT]


def radio(engine: Upscaler, limit: str) -> dict[str, Any]:
    """The choice between an engine's limits."""
    known = limits_of(engine)
    info = None if engine.routed else 'This network has no branches to choose from.'
    return dict(
        choices=[(LIMITS[name], name) for name in known], value=limit if limit in known else known[0], info=info)


def sliders(engine: Upscaler) -> dict[str, gr.Slider]:
    """A slider for each limit, of which one is seen."""
    first = limits_of(engine)[0]
    return {
        'budget':
        gr.Slider(
            0.05,
            1.2,
            0.5,
            step=0.01,
            label='Budget',
            info="Share of the hardest branch's cost",
            visible=first == 'budget',
            buttons=[],
            elem_id='budget'),
        'max_loss':
        gr.Slider(
            0.01,
            2,
            0.1,
            step=0.01,
            label='Loss in dB',
            info='PSNR that may be lost against the hardest branch, predicted',
            visible=False,
            buttons=[],
            elem_id='max_loss'),
        'fidelity':
        gr.Slider(
            30,
            60,
            45,
            step=0.5,
            label='Fidelity in dB',
            info="PSNR relative to the hardest branch's image, predicted",
            visible=False,
            buttons=[],
            elem_id='fidelity')
    }


def examples() -> dict[str, Path]:
    """Photographs to try it with, by name."""
    found = importlib.util.find_spec('skimage')
    folder = Path(found.origin).parent / 'data' if found and found.origin else HERE
    return {name: folder / name for name in EXAMPLES if (folder / name).is_file()}


def example_buttons(paths: dict[str, Path]) -> str:
    """The examples as small images to press."""
    if not paths:
        return ''
    buttons = []
    for name, path in paths.items():
        pixels = read_image(path).pixels
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        square = np.ascontiguousarray(pixels[top:top + side, left:left + side])
        url = views.data_url(*views.encoded(views.resized(square, (160, 160)), None))
        buttons.append(f'<button type="button" value="{name}" title="{EXAMPLES[name]}">'
                       f'<img src="{url}" alt="Example: {EXAMPLES[name]}"></button>')
    return f'<p>Or try one of these:</p><div class="row">{"".join(buttons)}</div><small>{CREDIT}</small>'


def part_of(sessions: Sessions) -> Any:
    """What the viewer calls for the part of an image that it shows at 100 %."""

    def part(wanted: dict[str, Any]) -> Optional[dict[str, Any]]:
        session = sessions.by_token(str(wanted['token']))
        box = views.Box(*(int(wanted[name]) for name in views.Box._fields))
        # no more than a large screen shows
        return session.part(box._replace(width=min(box.width, 6000), height=min(box.height, 4000))) if session else None

    return part


def view(session: Session) -> dict[str, Any]:
    """What viewer.js shows."""
    decision = session.decision
    if session.picture is None or decision is None:
        return {}
    height, width = decision.engine.size_of(*session.picture.pixels.shape[:2])
    result = session.result
    plan = result.plan if decision.plan is None and result is not None else decision.plan
    classes = plan.class_map().numpy() if decision.engine.routed and plan is not None else None
    return dict(
        token=session.token,
        number=session.number,
        size=[width, height],
        before=file_url(session.before),
        after=file_url(session.after) if result else '',
        map='' if classes is None else views.map_url(classes, decision.engine.num_classes),
        names=dict(before='Bicubic', after=name_of(result.decision.model) if result else ''))


def file_url(path: Path) -> str:
    """Where Gradio serves a file of its folder."""
    return f'gradio_api/file={path}'


def alert(text: str) -> str:
    """A line with an error."""
    return f'<div class="error" role="alert">{escape(text)}</div>'


def wrong(text: str) -> Any:
    """What is wrong with an upload."""
    return gr.update(value=alert(text), visible=True)


def status(text: str, share: Optional[float] = None) -> str:
    """A line with the status.

    Args:
        text: The line.
        share: Of what is done; 0 if that is not known. Default: nothing goes on.
    """
    if share is None:
        return f'<div class="line" role="status">{escape(text)}</div>'
    value = f' max="1" value="{share:.3f}"' if share else ''
    bar = f'<progress{value} aria-label="{escape(text)}"></progress>'
    return f'<div class="line"><span role="status">{escape(text)} …</span>{bar}</div>'


def reason(error: BaseException, name: str) -> str:
    """Why something failed, without the folders of this machine."""
    text = one_line(error)
    return text.split(f'{name}: ', 1)[-1] or type(error).__name__


def done(session: Session) -> str:
    """What was done, in a line."""
    result, picture = session.result, session.picture
    assert result is not None and picture is not None
    (height, width), (high, wide) = picture.pixels.shape[:2], result.pixels.shape[:2]
    text = f'{session.source.name}: {width} × {height} to {wide} × {high} in {seconds(result.seconds)}, measured.'
    return ' '.join([text, *(f'{note[0].upper()}{note[1:]}.' for note in result.notes)])


def seconds(value: float) -> str:
    """A time as text."""
    return f'{1000 * value:.0f} ms' if value < 0.1 else f'{value:.2f} s' if value < 10 else f'{value:.0f} s'


def numbers(decision: Decision, plan: Any, pace: float) -> str:
    """What a decision costs: time, operations, predicted loss, and the share of each branch.

    Args:
        decision: The decision.
        plan: What it does with the image; None if that is not known yet.
        pace: How many times as long as by the speed of its parts the network takes.
    """
    engine = decision.engine
    if plan is None:
        return '<p class="note">This network routes while it runs: its cost is known at the end.</p>'
    figures = []
    if decision.milliseconds is not None:
        time, hardest = (pace * ms / 1000 for ms in decision.milliseconds)
        note = f'hardest branch alone: {seconds(hardest)}' if engine.routed else ''
        figures.append(('Time, estimated', seconds(time), note))
    if engine.routed:
        figures.append(('Operations', f'{100 * plan.cost:.0f} %', 'of the hardest branch alone'))
    if decision.decibels is not None and isinstance(engine, TileUpscaler):
        name, note = (('Fidelity, predicted', "to the hardest branch's image") if engine.reference == 'hardest' else
                      ('Loss, predicted', 'against the hardest branch'))
        figures.append((name, f'{decision.decibels:.2f} <small>dB</small>', note))
    text = '<dl>' + ''.join(f'<div><dt>{name}</dt><dd>{value}</dd><span class="note">{note}</span></div>'
                            for name, value, note in figures) + '</dl>'
    return text + (shares(plan.counts, engine.unit) if engine.routed else '')


def shares(counts: Sequence[int], unit: str) -> str:
    """The shares of the branches, as a bar and in numbers."""
    colors = ['#' + bytes(color[::-1]).hex() for color in class_colors(len(counts))]
    parts = [100 * count / max(1, sum(counts)) for count in counts]
    names = ['easiest', *[''] * (len(counts) - 2), 'hardest']
    kind = 'Branch' if unit == TileUpscaler.unit else 'Sampler'  # of PCSR
    bar = ''.join(f'<span style="width:{part:.2f}%;background:{color}"></span>' for part, color in zip(parts, colors))
    legend = ''.join(f'<li><i style="background:{color}"></i>{kind} {i}{f", {name}" * bool(name)}: {part:.0f} %</li>'
                     for i, (part, color, name) in enumerate(zip(parts, colors, names)))
    about = f'{unit} of each {kind.lower()}'
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul aria-label="{about}">{legend}</ul>'
