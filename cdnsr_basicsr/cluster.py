"""Upscaling on many machines: what `basicsr upscale --ray` does.

This process lists images and results, and sums up what becomes of them. The engines, one for each GPU or for some
cores, are actors of Ray Data, which starts them, gives them images, and starts those again that were killed. Their
images are then given out again; `Attempts` remembers which were done, and which kill every engine. A result is made
beside its place or, for a URI, on the engine's machine, and appears under its name when it is complete.
"""
from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import torch
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tqdm import tqdm
from typing import Any, Generator, Iterator, NamedTuple, Optional, Sequence

from .files import is_running, make_writable
from .inference import TileUpscaler, Upscaler
from .inference.image_io import EXTENSIONS, list_images, read_image
from .inference.pictures import planned_rows
from .inference.speed import Speed
from .inference.upscale import (
    Handling,
    Job,
    Outcome,
    Summary,
    check_map,
    check_naming,
    is_uri,
    list_jobs,
    named_images,
    no_pictures,
    outcome_of,
    summary_of,
)
from .loading import choose_backend, upscaler_for
from .options import OptionError, check_choice, one_line
from .settings import AUTO, WEIGHED, Settings

TRIES = 3  # engines that an image may kill before it is left out
PART = 8  # images that an engine at least adds up
TASK, TASKS = 8, 20000  # images that an engine gets at once, unless that would be more tasks
OBJECT_STORE = 2**28  # bytes of memory for what goes to and from engines of this machine: names and numbers only
# where a file appears when all of it has been sent, and renaming is copying; elsewhere it is renamed when it is whole
OBJECT_STORES = {'abfs', 'abfss', 'adl', 'az', 'gcs', 'gs', 'hf', 'oci', 'oss', 'r2', 's3', 's3a', 'tos'}
LEFT_BEHIND = 'basicsr-upscale-'  # begins names of folders in the system's temporary folder; a process id follows

Looked = list[tuple[int, int, torch.Tensor]]  # height, width and predicted errors of what an image has a plan for


class Price(NamedTuple):
    """What all engines have to agree on.

    Attributes:
        price: Of all images together; None if each keeps to a limit by itself, or there is none.
        speed: Of branches and classifier, where costs are times.
    """
    price: Optional[float] = None
    speed: Optional[Speed] = None


class Orders(NamedTuple):
    """What each engine needs to know.

    Attributes:
        settings: Of its upscaler.
        cores: Threads of it; 0 if it has a GPU.
        folder: What relative names are relative to.
        handling: How images are processed.
        weigh: See `upscale_files`.
        source, output: Folder of the images, and of the results, or URIs.
        work: Folder beside the results where they are made; at a URI, where they are sent to.
    """
    settings: Settings
    cores: int
    folder: str
    handling: Handling
    weigh: str
    source: str
    output: str
    work: str


def upscale_on_cluster(settings: Settings,
                       source: str,
                       output: str,
                       address: str,
                       suffix: str = '',
                       ext: Optional[str] = None,
                       per_picture: bool = False,
                       weigh: str = WEIGHED[0],
                       **handling: Any) -> tuple[Upscaler, Summary]:
    """Upscales an image, or all images of a folder, by engines on the machines of a Ray cluster.

    Results are those of `upscale_files`, and folders are treated alike: existing results are kept, an image that fails
    does not stop the others, and one price holds for all.

    Args:
        settings: Of the engines. A file that they name is read on each machine.
        source, output: File or folder, and folder for the results; or URIs, for which the packages of fsspec are needed
            on each machine. A folder is seen by all machines.
        address: Of the cluster; 'auto' finds one that runs on this machine, 'local' starts one of this machine's cores
            and GPUs.
        suffix, ext, per_picture, weigh: See `upscale_files`.
        handling: See Handling.

    Returns:
        An upscaler of these settings, on the CPU of this machine, and what was done.

    Raises:
        OptionError: An argument is out of range, Ray is not installed, there is no such cluster, or engines fail.
        FileNotFoundError, OSError: See `upscale_files`.
    """
    source, output = (name.rstrip('/') if is_uri(name) else name for name in (source, output))
    extension = check_naming(suffix, ext)
    check_choice(weigh, 'weigh', WEIGHED)
    if settings.device not in (None, 'cpu', 'cuda'):
        raise OptionError(f'device={settings.device}', 'Ray gives each engine a GPU; accepted: cpu, cuda')
    if settings.memory == AUTO:
        raise OptionError('memory=auto', 'engines share a machine; expected the size for each, such as 4G')
    ray = import_ray()
    on_gpu = choose_backend(settings) == 'torch' and settings.device != 'cpu'
    upscaler = upscaler_for(replace(settings, device='cpu', memory=None))
    how = Handling(**handling)
    check_map(upscaler, how.map)
    names, place, others, closed = listed(source, output, suffix, extension)
    existing = files_below(output)
    jobs = list(list_jobs(names, place, output, suffix, extension, how, existing.__contains__))
    failed = [Outcome(path, f'cannot be listed: {reason}') for path, reason in closed]
    settled = [outcome_of(upscaler, job, how) for job in jobs if job.refused or job.present]
    waiting = [job for job in jobs if not (job.refused or job.present)]

    def outcomes() -> Generator[Outcome, None, None]:
        yield from settled
        if not waiting:
            return
        work = os.path.join(output, f'.basicsr-{uuid.uuid4().hex[:12]}')
        with contextlib.ExitStack() as stack:
            stack.callback(remove, output, work)
            stack.enter_context(session(ray, address))
            engines, cores = size_of_cluster(ray, on_gpu, settings.device)
            on_device = replace(settings, device='cpu' if cores else 'cuda')
            orders = Orders(on_device, cores, os.getcwd(), how, weigh, place, output, work)
            pool = Pool(ray, orders, engines)
            price = Price()
            looked: dict[str, Looked] = {}
            if upscaler.shares_price and not per_picture and len(names) > 1:
                looked = dict(tqdm(pool.run(Looking, price, jobs), 'checking', len(jobs), unit='image', disable=None))
            if isinstance(upscaler, TileUpscaler) and upscaler.routed:
                price = pool.price(upscaler, [item for job in jobs for item in looked.get(job.source, [])])
            for _, outcome in pool.run(Upscaling, price, waiting):
                yield outcome._replace(seconds=outcome.seconds / engines)  # the bar shows the speed of all together

    with contextlib.closing(outcomes()) as run:
        return upscaler, summary_of(upscaler, run, len(jobs), failed, others)


def import_ray() -> Any:
    """Ray, quiet, with Ray Data.

    Raises:
        OptionError: It is not installed.
    """
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # reports nothing to anyone
    try:
        import ray
        import ray.data
    except ImportError as error:
        needed = "needs Ray: pip install 'cdnsr-basicsr[ray]' (Python 3.10 or newer)"
        raise OptionError('--ray', needed) from error
    for name in ('ray', 'ray.data', 'ray.train'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray


@contextlib.contextmanager
def session(ray: Any, address: str) -> Iterator[None]:
    """Joins a cluster, or starts one.

    Raises:
        OptionError: There is none at this address.
    """
    own: dict[str, Any] = dict(include_dashboard=False, object_store_memory=OBJECT_STORE) if address == 'local' else {}
    with silence():
        before = signal.getsignal(signal.SIGTERM)
        try:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
            except Exception as error:  # what Ray raises if it takes too long to start has no type of its own
                what = 'cannot be started' if address == 'local' else 'cannot be joined'
                raise OptionError(f'--ray {address}', f'the cluster {what}: {one_line(error)}') from error
            finally:
                if before is not None and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)  # Ray takes it for itself
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses all output but that of this process's Python to standard error: Ray's threads and its native code
    report restarts of engines, and more; lasting errors are exceptions."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    errors = sys.stderr
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, 'w'))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            if errors.fileno() == 2:
                errors = stack.enter_context(open(os.dup(kept[1]), 'w', encoding=errors.encoding, errors=errors.errors))
        except OSError:  # it is no file
            pass
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)


def size_of_cluster(ray: Any, on_gpu: bool, device: Optional[str]) -> tuple[int, int]:
    """Number of engines that a cluster has room for, and cores of each; 0 of one that has a GPU."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get('GPU', 0)), int(resources.get('CPU', 0))
    if on_gpu and gpus:
        return gpus, 0
    if on_gpu and device == 'cuda':
        raise OptionError('device=cuda', 'the cluster has no GPU')
    text = os.environ.get('OMP_NUM_THREADS') or '1'
    cores = int(text) if text.isdecimal() else 0
    if not 1 <= cores <= cpus:
        raise OptionError(f'OMP_NUM_THREADS={text}',
                          f'expected the cores of an engine, from 1 to those of the cluster, {cpus}')
    return cpus // cores, cores


class Pool:
    """The engines of a cluster."""

    def __init__(self, ray: Any, orders: Orders, engines: int) -> None:
        self.ray, self.orders, self.engines = ray, orders, engines
        self.resources = dict(num_cpus=orders.cores) if orders.cores else dict(num_cpus=0, num_gpus=1)
        self.attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()

    def run(self, engine: type[Engine], price: Price, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        """Does jobs; yields the images of all and the outcome of each, in any order."""
        import pyarrow
        if not jobs:
            return
        size = max(1, min(TASK, len(jobs) // (4 * self.engines)), -(-len(jobs) // TASKS))
        tables = [
            pyarrow.table({'job': pyarrow.array([pickle.dumps(job) for job in jobs[first:first + size]])})
            for first in range(0, len(jobs), size)
        ]
        strategy = self.ray.data.ActorPoolStrategy(min_size=1, max_size=self.engines)
        done = self.ray.data.from_arrow(tables).map_batches(
            engine,
            batch_size=None,
            batch_format='pyarrow',
            compute=strategy,
            fn_constructor_args=(self.orders, price, self.attempts),
            **self.resources)
        with self._failures():
            for batch in done.iter_batches(batch_size=None, batch_format='pyarrow'):
                found = [pickle.loads(item.as_py()) for item in batch.column('found')]
                self.attempts.forget.remote([(engine.kind, source) for source, _ in found])
                yield from found

    def price(self, upscaler: TileUpscaler, looked: Looked) -> Price:
        """The price at which all of these keep to the limit together, and the speed that it is for, if it is for one.

        Each engine adds up a part of them: there may be millions, and what they cost at a price takes milliseconds.
        """
        price = Price()
        with self._failures():
            if upscaler.by_time:
                measured = self.ray.remote(max_retries=-1, **self.resources)(speed_of)
                price = Price(None, self.ray.get(measured.remote(self.orders)))
            if looked:
                parts = min(self.engines, -(-len(looked) // PART))
                shared = self.ray.remote(max_restarts=-1, max_task_retries=-1, **self.resources)(Weighing)
                actors = [shared.remote(self.orders, price, looked[part::parts]) for part in range(parts)]
                limit = sum(self.ray.get([actor.limit.remote() for actor in actors]))
                value = upscaler.price_within(
                    limit, lambda price: sum(self.ray.get([actor.sum_at.remote(price) for actor in actors])))
                price = price._replace(price=value)
                for actor in actors:
                    self.ray.kill(actor)
        return price

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self.ray.exceptions.RayError as error:
            cause: BaseException = error
            while cause.__cause__ is not None or getattr(cause, 'cause', None) is not None:
                cause = cause.__cause__ or cause.cause  # type: ignore[attr-defined]
            raise OptionError('--ray', f'an engine has failed: {one_line(cause)}') from error


class Attempts:
    """Remembers what becomes of images while engines have them: an engine that was killed knows nothing any more."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.found: dict[tuple[str, str], Any] = {}

    def begin(self, what: str, source: str) -> tuple[int, Any]:
        """Begins an attempt at an image. Returns how many attempts have failed, and the outcome if one has ended."""
        if (what, source) in self.found:
            return 0, self.found[what, source]
        self.tries[source] += 1
        return self.tries[source] - 1, None

    def end(self, what: str, source: str, found: Any, lost: bool) -> None:
        """Ends the attempt; an image that is given up stays so."""
        if found is not None:
            self.found[what, source] = found
        if not lost:
            del self.tries[source]

    def forget(self, ended: Sequence[tuple[str, str]]) -> None:
        """Forgets outcomes that have arrived."""
        for key in ended:
            self.found.pop(key, None)


def upscaler_of(orders: Orders, price: Price = Price()) -> Upscaler:
    """The upscaler that an engine is ordered to have, in this process."""
    with contextlib.suppress(OSError):  # another machine need not have it, unless names are relative
        os.chdir(orders.folder)
    if orders.cores:
        torch.set_num_threads(orders.cores)
    upscaler = upscaler_for(orders.settings)
    upscaler.measured = price.speed or upscaler.measured
    if price.price is not None:
        assert isinstance(upscaler, TileUpscaler)
        upscaler.fix_price(price.price, orders.weigh)
    return upscaler


def speed_of(orders: Orders) -> Speed:
    """The measured speed of an engine."""
    upscaler = upscaler_of(orders)
    assert isinstance(upscaler, TileUpscaler)
    return upscaler.speed


class Weighing:
    """Adds up what a part of the images may cost or lose, and what they cost or lose at a price."""

    def __init__(self, orders: Orders, price: Price, looked: Looked) -> None:
        upscaler = upscaler_of(orders, price)
        assert isinstance(upscaler, TileUpscaler)
        upscaler.weigh = orders.weigh
        sizes = [Size(height, width) for height, width, _ in looked]
        self.upscaler, self.looks = upscaler, upscaler.looks_of(sizes, [errors for _, _, errors in looked])

    def limit(self) -> float:
        return self.upscaler.limit_of(self.looks)

    def sum_at(self, price: float) -> float:
        return self.upscaler.sum_at(price, self.looks)


@dataclass
class Size:
    """Stands in for an image of which only the size is needed: its rows are never read."""
    height: int
    width: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        raise NotImplementedError


class Engine:
    """An upscaler on a machine of the cluster, which Ray Data gives jobs."""
    kind: str  # of what it does; Ray Data runs a class of its own below this one, with another name

    def __init__(self, orders: Orders, price: Price, attempts: Any) -> None:
        import ray
        self.get, self.attempts, self.orders = ray.get, attempts, orders
        actor = ray.get_runtime_context().get_actor_id()  # stays the same when Ray starts it again
        if self.get(attempts.begin.remote('start', actor))[0] >= TRIES:
            raise RuntimeError(f'it was killed {TRIES} times while it was started; is there too little memory?')
        self.upscaler = upscaler_of(orders, price)
        attempts.end.remote('start', actor, None, False)
        for name in os.listdir(tempfile.gettempdir()):  # of engines that were killed
            if name.startswith(LEFT_BEHIND) and not is_running(name.split('-')[2]):
                shutil.rmtree(os.path.join(tempfile.gettempdir(), name), ignore_errors=True)
        self.folder = tempfile.TemporaryDirectory(prefix=f'{LEFT_BEHIND}{os.getpid()}-')

    def __call__(self, table: Any) -> Any:
        import pyarrow
        found = [self._found(pickle.loads(item.as_py())) for item in table.column('job')]
        return pyarrow.table({'found': pyarrow.array([pickle.dumps(item) for item in found])})

    def _found(self, job: Job) -> tuple[str, Any]:
        tries, found = self.get(self.attempts.begin.remote(self.kind, job.source))
        if found is None:
            lost = tries >= TRIES
            found = self.lost(job) if lost else self.do(job)
            self.attempts.end.remote(self.kind, job.source, found, lost)
        return job.source, found

    @contextlib.contextmanager
    def fetched(self, source: str) -> Iterator[str]:
        """An image as a file of this machine."""
        if not is_uri(source):
            yield source
            return
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder:
            local = os.path.join(folder, 'picture' + os.path.splitext(source)[1])
            store = Store(self.orders.source)
            store.system.get_file(store.path(source), local)
            yield local

    def do(self, job: Job) -> Any:
        raise NotImplementedError

    def lost(self, job: Job) -> Any:
        """The outcome of an image that kills every engine."""
        raise NotImplementedError


class Looking(Engine):
    """Predicts errors of images; of those that cannot be read it says nothing: they are named later."""
    kind = 'looking'

    def do(self, job: Job) -> Looked:
        assert isinstance(self.upscaler, TileUpscaler)
        looked: Looked = []
        try:
            with self.fetched(job.source) as path:
                picture = read_image(path, self.orders.handling.max_megapixels)
        except Exception:  # of fsspec's packages, which have no common type
            return looked
        for rows in planned_rows(self.upscaler, picture.pixels):
            errors = self.upscaler.predict(rows).errors
            assert errors is not None, 'images share a price only where errors are predicted'
            looked.append((rows.height, rows.width, errors))
        return looked

    def lost(self, job: Job) -> Looked:
        return []


class Upscaling(Engine):
    """Upscales images."""
    kind = 'upscaling'

    def do(self, job: Job) -> Outcome:
        try:
            with self.fetched(job.source) as path, self._staging() as folder:
                return self._upscaled(job, path, folder)
        except Exception as error:  # of fsspec's packages, which have no common type
            return Outcome(job.source, one_line(error).removeprefix(f'{job.source}: '))

    def lost(self, job: Job) -> Outcome:
        return Outcome(job.source, f'{TRIES} engines were killed by it; is there too little memory?')

    @contextlib.contextmanager
    def _staging(self) -> Iterator[str]:
        """A folder for results that are not complete yet: if possible, where renaming them moves them."""
        beside = None if is_uri(self.orders.output) else self.orders.work
        if beside:
            os.makedirs(beside, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside or self.folder.name) as folder:
            yield folder

    def _upscaled(self, job: Job, path: str, folder: str) -> Outcome:
        result, large = (os.path.join(folder, os.path.basename(name)) for name in (job.result, job.large))
        outcome = outcome_of(self.upscaler, job._replace(source=path, result=result, large=large), self.orders.handling)
        if outcome.done:
            for name in sorted(os.listdir(folder), key=lambda name: name not in map(os.path.basename, (result, large))):
                self._publish(os.path.join(folder, name), os.path.join(os.path.dirname(job.result), name))
        failed = outcome.failed
        for here, there in ((path, job.source), (result, job.result), (large, job.large)):
            failed = failed.replace(here, there)
        return outcome._replace(source=job.source, failed=failed)

    def _publish(self, path: str, name: str) -> None:
        """Gives a complete file its name."""
        if not is_uri(self.orders.output):
            os.makedirs(os.path.dirname(name) or os.curdir, exist_ok=True)
            os.replace(path, name)
            return
        store = Store(self.orders.output)
        if store.whole:
            store.system.put_file(path, store.path(name))
            return
        on_the_way = os.path.join(store.path(self.orders.work), uuid.uuid4().hex)
        for folder in (on_the_way, store.path(name)):
            store.system.makedirs(os.path.dirname(folder), exist_ok=True)
        store.system.put_file(path, on_the_way)
        store.system.mv(on_the_way, store.path(name))


class Store:
    """Files below a URI, by fsspec.

    Attributes:
        system: The file system.
        root: The URI's path in it.
        whole: Whether a file appears when all of it has been sent.

    Raises:
        OptionError: The URI is of no kind that is known, or its package is not installed.
    """

    def __init__(self, uri: str) -> None:
        import fsspec
        self.uri = uri
        try:
            self.system, self.root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise OptionError(uri, f'cannot be opened by fsspec: {one_line(error)}') from error
        protocols = {self.system.protocol} if isinstance(self.system.protocol, str) else set(self.system.protocol)
        if 'memory' in protocols:
            raise OptionError(uri, 'is in the memory of this process, where no engine sees it')
        self.root = self.root.rstrip('/')
        self.whole = bool(protocols & OBJECT_STORES)

    def path(self, uri: str) -> str:
        """The path of a URI below this one."""
        assert uri.startswith(self.uri), (uri, self.uri)
        return str(self.root) + uri[len(self.uri):]

    def names(self) -> list[str]:
        """Names of all files below the URI, sorted.

        Raises:
            OSError: They cannot be listed.
        """
        try:
            return sorted(os.path.relpath(path, self.root) for path in self.system.find(self.root))
        except Exception as error:  # of fsspec's packages, which have no common type
            raise OSError(f'{self.uri}: cannot be listed: {one_line(error)}') from error


def listed(source: str, output: str, suffix: str,
           extension: Optional[str]) -> tuple[list[Path], str, list[str], list[tuple[str, str]]]:
    """What is to be upscaled of a file or folder, or of a URI; see `named_images`.

    Returns:
        Names of the images, what they are below, and files and folders that are left out.
    """
    if not (is_uri(source) or is_uri(output)):
        names, others, closed = named_images(source, output, suffix, extension)
        return names, source if os.path.isdir(source) else os.path.dirname(source) or os.curdir, others, closed
    closed = []
    if is_uri(source):
        store = Store(source)
        files = [Path(name) for name in store.names()]
        place = source.rstrip('/')
        if [str(name) for name in files] == [os.curdir]:  # it is a file itself
            place, _, name = place.rpartition('/')
            files = [Path(name)]
    elif os.path.isdir(source):
        found = list_images(Path(source))
        place, files = source, [path.relative_to(source) for path in sorted(found.images + found.others)]
        closed = [(str(path), reason) for path, reason in found.closed]
    else:
        place, files = os.path.dirname(source) or os.curdir, [Path(os.path.basename(source))]
        if not os.path.exists(source):
            raise FileNotFoundError(f'{source}: no such file or folder')
    if not is_uri(output):
        make_writable(output)
    files = [name for name in files if not any(part.startswith('.') for part in name.parts)]
    inner = below(output, place)
    if inner == os.curdir:
        if not suffix:
            raise FileExistsError(f'{output}: the results would replace the images; use another folder or --suffix')
        files = [name for name in files if not name.stem.endswith((suffix, f'{suffix}_map'))]
    elif inner:
        files = [name for name in files if Path(inner) not in name.parents]
    names = [name for name in files if name.suffix.lower() in EXTENSIONS]
    if not names and not closed:
        raise no_pictures(source)
    others = [os.path.join(place, name) for name in files if name.suffix.lower() not in EXTENSIONS]
    return names, place, others, closed


def below(inner: str, outer: str) -> Optional[str]:
    """The name of a folder below another one; None if it is not below it."""

    def where(name: str) -> tuple[Any, str]:
        if not is_uri(name):
            return 'file', os.path.realpath(name)
        store = Store(name)
        protocol = store.system.protocol
        protocol = protocol if isinstance(protocol, str) else protocol[0]
        return protocol, os.path.realpath(store.root) if protocol == 'file' else store.root

    (first, inside), (second, around) = where(inner), where(outer)
    name = os.path.relpath(inside, around) if first == second else os.pardir
    return None if name.split(os.sep)[0] == os.pardir else name


def files_below(folder: str) -> set[str]:
    """All files of a folder, or of a URI, by their full names."""
    if is_uri(folder):
        return {os.path.join(folder, name) for name in Store(folder).names()}
    top = '' if folder == os.curdir else folder
    return {
        os.path.join(top, os.path.relpath(os.path.join(place, name), folder))
        for place, _, names in os.walk(folder)
        for name in names
    }


def remove(output: str, work: str) -> None:
    """Removes what engines that were killed have left."""
    if not is_uri(output):
        shutil.rmtree(work, ignore_errors=True)
    elif not Store(output).whole:
        store = Store(output)
        with contextlib.suppress(Exception):  # mostly there is nothing
            store.system.rm(store.path(work), recursive=True)
