"""A visitor's image: read and its errors predicted once, then routed at any limit and upscaled."""
from __future__ import annotations

import numpy as np
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from torch import nn
from typing import Any, Iterator, NamedTuple, Optional
from weakref import WeakKeyDictionary

from ..decoding.process import Picture
from ..inference import TileUpscaler, Upscaler
from ..inference.image_io import read_image
from ..inference.pictures import color_rows
from ..inference.tile_upscaler import Prediction
from ..inference.upscale import result_path, writable_path, write_upscaled
from ..loading import choose_device, load
from . import views

REST = 0.4  # seconds without a change after which pixels are computed
LOADED = 4  # engines that are kept
UPLOADED = re.compile('[0-9a-f]{64}')  # what Gradio calls the folder of an uploaded file


class Stopped(Exception):
    """The result that is being computed is no longer wanted."""


class Engines:
    """Loaded networks, those that were used last; one image is upscaled at a time.

    Attributes:
        loading, running: Held while a network is loaded, and while an image is upscaled.
        pace: How many times as long as by the speed of its parts a network took last.
    """

    def __init__(self) -> None:
        self.loaded: OrderedDict[tuple[str, str, str], Upscaler] = OrderedDict()
        self.loading, self.running = threading.Lock(), threading.Lock()
        self.pace: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()

    def has(self, model: str, precision: str, device: str) -> bool:
        """Whether an engine is ready."""
        return (model, precision, device) in self.loaded

    def get(self, model: str, precision: str, device: str) -> Upscaler:
        """The engine of a model, its speed measured.

        Raises:
            OptionError: There is none such.
        """
        key = (model, precision, device)
        with self.loading:
            engine = self.loaded.pop(key, None) or load(model, precision=precision, device=device)
            if isinstance(engine, TileUpscaler):
                engine.measure_speed()
            self.loaded[key] = engine
            while len(self.loaded) > LOADED:
                self.loaded.popitem(last=False)
        return engine


class Decision(NamedTuple):
    """What is to be done with an image.

    Attributes:
        engine: Under the limit that was chosen.
        model: Its name or path.
        plan: What it will do; None if that shows only when it is done.
        milliseconds: Time of it, and of the hardest branch on the whole image, by the measured speed of the parts.
        decibels: Predicted loss of PSNR against the hardest branch, or, if the router has learnt from its image,
            predicted fidelity; None if no errors are predicted.
    """
    engine: Upscaler
    model: str
    plan: Any
    milliseconds: Optional[tuple[float, float]]
    decibels: Optional[float]


class Result(NamedTuple):
    """An upscaled image.

    Attributes:
        decision: What was done.
        plan: The same, as it was run.
        file: As `basicsr upscale` writes it.
        pixels: of shape (h, w, c), uint8.
        seconds: How long the engine took.
        notes: What the file could not hold, and what is not seen of the image's file.
    """
    decision: Decision
    plan: Any
    file: Path
    pixels: np.ndarray
    seconds: float
    notes: tuple[str, ...]


def _alike(decision: Decision, other: Optional[Decision]) -> bool:
    """Whether two decisions make the same pixels of an image."""
    if other is None or decision.plan is None or other.plan is None:
        return False
    return decision.engine.net is other.engine.net and decision.plan.strips == other.plan.strips


class Session:
    """A visitor's image and its results. All files are in one folder, whose name nobody else can guess.

    Args:
        root: Folder for the folders of all sessions.
        engines: Shared by all sessions.

    Attributes:
        number: Of the image, from 1 on.
        share: Share of the image that is done, while it is being upscaled; None while another image is.
        before, after: Files of the bicubic and of the upscaled image at a size to look at.
    """

    def __init__(self, root: Path, engines: Engines) -> None:
        self.token = secrets.token_urlsafe(24)
        self.folder, self.engines = root / f'session-{self.token}', engines
        self.folder.mkdir()
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.number, self.runs, self.changed = 0, 0, 0.
        self.share: Optional[float] = None
        self.job: Optional[threading.Thread] = None
        self.failure: Optional[BaseException] = None
        self.picture: Optional[Picture] = None
        self.source = self.before = self.after = Path()
        self.before_scale = 0.
        self.seen: Optional[tuple[Upscaler, Optional[Prediction]]] = None
        self.decision: Optional[Decision] = None
        self.result: Optional[Result] = None

    # the image

    def open(self, path: Path, name: str, max_megapixels: float, move: bool) -> None:
        """Replaces the image by another one; it stays if the file cannot be read.

        Raises:
            ImageError: The file cannot be read.
        """
        folder = self.folder / f'image-{self.number + 1}'
        source = folder / 'file' / name
        with self.lock:
            source.parent.mkdir(parents=True)
            try:
                (shutil.move if move else shutil.copyfile)(str(path), source)
                picture = read_image(source, max_megapixels)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(self.folder / f'image-{self.number}', ignore_errors=True)
            self.picture, self.source, self.number = picture, source, self.number + 1
            self.seen = self.decision = None
            self.before_scale = 0.
            self._forget_result()

    @property
    def stale(self) -> bool:
        """Whether there are other pixels to compute than those there are."""
        return self.decision is not None and (self.result is None or self.result.decision is not self.decision)

    def decide(self, engine: Upscaler, model: str, limit: Optional[str], value: float) -> bool:
        """Decides on the image; its errors are predicted when an engine first sees it.

        Returns:
            Whether that is another decision than before.

        Raises:
            ValueError: The engine has no such limit.
        """
        with self.lock:
            if self.picture is None:
                return False
            rows = color_rows(engine, self.picture.pixels)
            limited = engine.limited_to(**{limit: value} if limit and engine.routed else {})
            if isinstance(engine, TileUpscaler) and isinstance(limited, TileUpscaler):
                if self.seen is None or self.seen[0] is not engine:
                    self.seen = engine, engine.predict(rows)
                prediction = self.seen[1]
                plan = limited.plan(rows, prediction=prediction)
                errors = prediction.errors if prediction else None
                decided = Decision(limited, model, plan, limited.milliseconds(plan),
                                   None if errors is None else limited.decibels(plan, errors))
            else:
                decided = Decision(limited, model, None, None, None)
            if _alike(decided, self.decision):
                return False
            if self.result is not None and _alike(decided, self.result.decision):
                decided = self.result.decision  # its pixels are there
            self.decision, self.changed = decided, time.monotonic()
            if engine.scale != self.before_scale:
                self.before, self.before_scale = self._show_before(), engine.scale
            self.stopping.clear()
        return True

    # its pixels

    def upscale(self) -> Iterator[Optional[float]]:
        """Computes what was decided, again after each change, until the result is up to date.

        Yields:
            Share of the image that is done, several times a second; None while another image has its turn.

        Raises:
            Stopped: That was asked for.
            ImageError, OSError, RuntimeError, MemoryError: It failed.
        """
        while self.stale:
            if self.stopping.is_set():
                raise Stopped
            if time.monotonic() - self.changed < REST:
                time.sleep(0.05)
                continue
            with self.lock:
                if self.job is None or not self.job.is_alive():
                    self.share, self.failure = None, None
                    self.job = threading.Thread(target=self._work, daemon=True)
                    self.job.start()
                job = self.job
            while job.is_alive():
                job.join(0.1)
                yield self.share
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure

    def _work(self) -> None:
        """Computes what is decided now, in a thread of its own."""
        decision, picture, source = self.decision, self.picture, self.source
        if decision is None or picture is None:
            return
        try:
            while not self.engines.running.acquire(timeout=0.1):
                self._check(decision)
            try:
                self._compute(decision, picture, source)
            finally:
                self.engines.running.release()
        except Stopped:
            pass
        except Exception as error:
            self.failure = error  # raised where the job is waited for

    def _check(self, decision: Decision) -> None:
        """Raises Stopped if a decision is not wanted any more."""
        if self.stopping.is_set() or self.decision is not decision:
            raise Stopped

    def _compute(self, decision: Decision, picture: Picture, source: Path) -> None:
        choose_device(str(decision.engine.device))  # of this thread
        self.runs += 1
        folder, begin, seconds = self.folder / f'result-{self.runs}', time.perf_counter(), 0.
        folder.mkdir()
        height, width, channels = picture.pixels.shape
        shape = (*decision.engine.size_of(height, width), channels)
        pixels = np.lib.format.open_memmap(folder / 'pixels.npy', 'w+', np.uint8, shape)

        def watch(share: float) -> None:
            self.share = share
            self._check(decision)

        def write(engine: Upscaler) -> tuple[Any, tuple[str, ...]]:
            top, plan = 0, decision.plan if engine is decision.engine else None

            def keep(strip: np.ndarray) -> None:
                nonlocal top, seconds
                pixels[top:top + len(strip)] = views.in_8_bits(strip)
                top, seconds = top + len(strip), time.perf_counter() - begin

            engine.watch = watch
            result = folder / result_path(Path(source.name), '', None)
            result = writable_path(engine, picture, result, result.with_suffix('.tif'))
            plan, lost = write_upscaled(engine, picture, result, watch=keep, plan=plan)
            files.append(result)
            return plan, lost

        files: list[Path] = []
        try:
            plan, lost = decision.engine.in_precision(write)
            shown = views.resized(pixels, views.shown_size(shape[:2])) if max(shape) > views.LONGEST else pixels
            after = self._save_view(folder / 'shown', np.asarray(shown))
            with self.lock:
                self._check(decision)
                self._forget_result()
                if decision.milliseconds is not None:
                    self.engines.pace[decision.engine.net] = 1000 * seconds / max(decision.milliseconds[0], 1e-3)
                self.result = Result(decision, plan, files[0], pixels, seconds, (*picture.notes, *lost))
                self.after = after
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def stop(self) -> None:
        """Ends what is being computed at its next block."""
        self.stopping.set()

    def resume(self) -> None:
        """Lets it be computed after all."""
        self.stopping.clear()

    # to look at

    def _show_before(self) -> Path:
        assert self.picture is not None and self.decision is not None
        pixels = views.in_8_bits(self.picture.pixels)
        size = views.shown_size(self.decision.engine.size_of(*pixels.shape[:2]))
        path = self.folder / f'image-{self.number}' / f'before-x{self.decision.engine.scale:g}'
        return self._save_view(path, views.resized(pixels, size))

    def _save_view(self, path: Path, pixels: np.ndarray) -> Path:
        assert self.picture is not None
        data, kind = views.encoded(pixels, self.picture.icc_profile)
        path = path.with_name(f'{path.name}.{kind}')
        path.write_bytes(data)
        return path

    def part(self, box: views.Box) -> Optional[dict[str, Any]]:
        """A part of the result at 100 %, before and after, as the page shows it."""
        with self.lock:
            if self.picture is None or self.decision is None:
                return None
            size = self.decision.engine.size_of(*self.picture.pixels.shape[:2])
            box = box.within(size)
            profile, result = self.picture.icc_profile, self.result
            before = views.bicubic_part(self.picture.pixels, size, box)
            urls = dict(before=views.data_url(*views.encoded(before, profile, exact=True)), after='')
            if result is not None and result.pixels.shape[:2] == size:
                after = np.array(result.pixels[box.y:box.y + box.height, box.x:box.x + box.width])
                urls['after'] = views.data_url(*views.encoded(after, profile, exact=True))
        return dict(box._asdict(), **urls)

    # its end

    def _forget_result(self) -> None:
        result, self.result, self.after = self.result, None, Path()
        if result is not None:
            shutil.rmtree(result.file.parent, ignore_errors=True)

    def end(self) -> None:
        """Stops, and removes all files."""
        self.stop()
        if self.job is not None:
            self.job.join()
        with self.lock:
            self.picture = self.decision = None
            self._forget_result()
            shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All visitors, by the name that Gradio has for each.

    Args:
        root: An empty folder for their files.
        engines: Shared by all.
    """

    def __init__(self, root: Path, engines: Engines) -> None:
        self.root, self.engines = root.resolve(), engines
        self.open: dict[str, Session] = {}
        self.gone: set[str] = set()
        self.lock = threading.Lock()

    def of(self, name: str) -> Session:
        """A visitor's session; one that has ended does not begin again."""
        with self.lock:
            if name in self.gone:
                raise Stopped
            if name not in self.open:
                self.open[name] = Session(self.root, self.engines)
            return self.open[name]

    def by_token(self, token: str) -> Optional[Session]:
        """The session that has a token, which only its own page knows."""
        with self.lock:
            return next(
                (one for one in self.open.values() if secrets.compare_digest(one.token.encode(), token.encode())), None)

    def uploaded(self, path: str) -> Optional[Path]:
        """A file, if it is one that was uploaded and has not been taken yet."""
        with suppress(OSError):
            file = Path(path).resolve()
            if file.parent.parent == self.root and UPLOADED.fullmatch(file.parent.name) and file.is_file():
                return file
        return None

    def end(self, name: str) -> None:
        """A visitor has left."""
        with self.lock:
            self.gone.add(name)
            session = self.open.pop(name, None)
        if session is not None:
            session.end()

    def end_all(self) -> None:
        for name in list(self.open):
            self.end(name)
