"""Upscaling files: what `basicsr upscale` does."""
from __future__ import annotations

import numpy as np
import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tqdm import tqdm
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union

from ..decoding.process import Picture
from ..files import replace_when_done
from ..memory import ShortOfMemory, mib
from ..options import OptionError, check_choice
from ..settings import MAX_MEGAPIXELS, WEIGHED
from .difficulty_map import map_bytes, save_difficulty_map
from .image_io import (
    EXTENSIONS,
    MAX_SIDES,
    TIFF,
    Found,
    ImageError,
    bytes_to_write,
    check_writable,
    list_images,
    read_image,
    write_image,
)
from .pictures import planned_rows, upscaled_strips
from .tiling import Rows
from .upscaler import Plan, Upscaler

# tqdm's own, without images per second, so that all of it fits into 80 columns
BAR = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'


class Summary(NamedTuple):
    """The result of a run.

    Attributes:
        done: Number of images written.
        present: Number of images whose result already existed.
        failed: Path of each image that failed, and why.
        megapixels: Of the results.
        seconds: Spent on them, reading and writing included.
        cost: Of all, relative to the most expensive branch on whole images, classifier and overlap included.
        counts: Tiles, or pixels of the results, of each class.
        notes: Path of each image that was not done as a whole, and what of it was, such as the first frame.
        left_out: Files of the folder whose endings are not those of images.
        memory_limit, peak: Bytes of memory that might be held, and that were held at most; None without a limit.
    """
    done: int
    present: int
    failed: list[tuple[str, str]]
    megapixels: float
    seconds: float
    cost: float
    counts: list[int]
    notes: list[tuple[str, str]]
    left_out: list[str]
    memory_limit: Optional[int] = None
    peak: Optional[int] = None


class Handling(NamedTuple):
    """How images are processed; see `upscale_files`."""
    map: bool = False
    overwrite: bool = False
    max_megapixels: float = MAX_MEGAPIXELS
    strip_metadata: bool = False


class Job(NamedTuple):
    """An image, and where its result goes.

    Attributes:
        source: The image.
        result: Its result.
        large: Its result if the format of `result` cannot hold it.
        present: Whether `result` exists and is kept.
        large_present: Whether `large` is.
        refused: Why the image cannot be done; empty otherwise.
    """
    source: str
    result: str
    large: str
    present: bool = False
    large_present: bool = False
    refused: str = ''


class Outcome(NamedTuple):
    """The outcome of an image: it was done, has failed, or already had a result.

    Attributes:
        source: The image.
        failed: Why it has failed; empty otherwise.
        done: Whether its result was written.
        pixels: Of the result.
        spent: Cost of it, times its pixels.
        counts: Tiles, or pixels of the result, of each class.
        seconds: Spent on it, reading and writing included.
        notes: What was not done of it.
    """
    source: str
    failed: str = ''
    done: bool = False
    pixels: int = 0
    spent: float = 0.
    counts: Sequence[int] = ()
    seconds: float = 0.
    notes: tuple[str, ...] = ()


def find_images(path: Path, output: Path, suffix: str) -> Found:
    """The file itself, or all images in a folder and its subfolders by extension, without hidden ones.

    Results of earlier runs are left out: what lies in an output folder inside of the folder, or, if they are the same
    folder, what has the suffix.
    """
    if not path.is_dir():
        return Found([path], [], [])
    root, folder, found = path.resolve(), output.resolve(), list_images(path)
    if root == folder:
        images = [file for file in found.images if not file.stem.endswith((suffix, f'{suffix}_map'))]
        return found._replace(images=images)
    if folder in root.parents:
        return found
    parents = {file.parent for file in found.images + found.others}
    results = {parent for parent in parents if folder in (parent.resolve(), *parent.resolve().parents)}
    images, others = ([file for file in files if file.parent not in results] for files in found[:2])
    return Found(images, others, found.closed)


def result_path(name: Path, suffix: str, extension: Optional[str]) -> Path:
    """Where the result of an image goes, below the output folder, by its name below the input folder; TIFF stays TIFF,
    all else becomes PNG.

    What is too large for PNG becomes TIFF too; that is seen when the image has been read.
    """
    kept = name.suffix if name.suffix.lower() in TIFF else '.png'
    return name.with_name(f'{name.stem}{suffix}{extension or kept}')


def map_path(result: Path) -> Path:
    """Path of the difficulty map of a result."""
    return result.with_name(f'{result.stem}_map.png')


def is_uri(name: str) -> bool:
    """Whether a name is a URI, like s3://bucket/folder, and no path."""
    return re.match(r'[a-z][a-z0-9+.:-]*://', name, re.I) is not None


def check_naming(suffix: str, ext: Optional[str]) -> Optional[str]:
    """Refuses suffixes that cannot be part of a file name, and formats that cannot be written.

    Returns:
        The extension with its dot, if there is one.
    """
    extension = None if ext is None else f'.{ext.lower().lstrip(".")}'
    if extension not in (None, *MAX_SIDES):
        raise OptionError(f'ext={ext}', 'accepted: png, jpg, webp, tif')
    if os.path.sep in suffix:
        raise OptionError(f'suffix={suffix}', f'expected no {os.path.sep}')
    return extension


def parse_shard(text: Optional[str]) -> tuple[int, int]:
    """I/N as two numbers. Default: the rank and number of the processes that torchrun started."""
    rank, processes = os.environ.get('RANK'), os.environ.get('WORLD_SIZE')
    if text is None and rank and processes:
        if not (rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)):
            raise OptionError(f'RANK {rank}, WORLD_SIZE {processes}',
                              'expected a rank below the size, as from torchrun')
        return int(rank) + 1, int(processes)
    if text is None:
        return 1, 1
    part, _, parts = text.partition('/')
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise OptionError(f'shard={text}', 'expected I/N with I from 1 to N, for example 2/8')
    return int(part), int(parts)


def upscale_files(upscaler: Upscaler,
                  source: Union[str, Path],
                  output: Union[str, Path],
                  suffix: str = '',
                  ext: Optional[str] = None,
                  map: bool = False,
                  overwrite: bool = False,
                  shard: Optional[str] = None,
                  max_megapixels: float = MAX_MEGAPIXELS,
                  strip_metadata: bool = False,
                  per_picture: bool = False,
                  weigh: str = WEIGHED[0]) -> Summary:
    """Upscales an image, or all images of a folder. An image that fails does not stop the others.

    Where there is a limit (budget, target_ms, max_loss, fidelity) and errors are predicted, it is kept by all images
    of the folder together, at one price of quality: they are all read once before, for their errors, those of other
    shards and those that already exist, too, so that what becomes of an image does not depend on what has been
    done.

    Args:
        upscaler: The engine.
        source: File or folder.
        output: Folder for the results; made if it is missing.
        suffix: Added to the names.
        ext: Format of the results: 'png', 'tif', 'jpg' or 'webp'. Default: TIFF for TIFF, otherwise PNG.
        map: Whether to write the difficulty map beside each result, as NAME_map.png.
        overwrite: Whether to replace existing results; they are left alone otherwise.
        shard: 'I/N': only every N-th image, beginning with the I-th. Default: all; of processes that torchrun has
            started, a part for each.
        max_megapixels: Larger images are refused.
        strip_metadata: Whether results are without EXIF and XMP; the colour profile says what colours mean, and stays.
        per_picture: Whether each image keeps to the limit by itself.
        weigh: 'pixels' | 'pictures': what of a folder counts alike; see Upscaler.together.

    Raises:
        OptionError: An argument is out of range, or the network does not route and there is nothing to map.
        FileNotFoundError: There is no such file or folder, or no image in it.
        OSError: The results cannot be written to that folder, or would replace the images themselves.
    """
    extension, (part, parts) = check_naming(suffix, ext), parse_shard(shard)
    check_choice(weigh, 'weigh', WEIGHED)
    handling = Handling(map, overwrite, max_megapixels, strip_metadata)
    check_map(upscaler, map)
    names, others, closed = named_images(source, output, suffix, extension)
    place, folder = Path(source), Path(output)
    place = place if place.is_dir() else place.parent
    first = part == 1  # what concerns the whole folder is said once
    jobs = list_jobs(names, str(place), str(folder), suffix, extension, handling, os.path.exists, (part, parts))

    def outcomes() -> Iterator[Outcome]:
        alone = per_picture or len(names) == 1
        with ExitStack() as stack:
            for job in jobs:
                if not (alone or job.present or job.refused):  # now, for there is something to do
                    looked_at = _looked_at(upscaler, [place / name for name in names], max_megapixels)
                    stack.enter_context(upscaler.together(looked_at, weigh))
                    alone = True
                yield outcome_of(upscaler, job, handling, len(names) == 1)

    failed = [Outcome(path, f'cannot be listed: {reason}') for path, reason in closed if first]
    return summary_of(upscaler, outcomes(), len(range(part - 1, len(names), parts)), failed, others if first else [])


def check_map(upscaler: Upscaler, map: bool) -> None:
    """Refuses maps of a network without classes."""
    if map and not upscaler.routed:
        raise OptionError('map=True', 'needs a network that routes, CDNSR or PCSR')


def named_images(source: Union[str, Path], output: Union[str, Path], suffix: str,
                 extension: Optional[str]) -> tuple[list[Path], list[str], list[tuple[str, str]]]:
    """What is to be upscaled of a file or folder, once the folder for the results has been made.

    Returns:
        Names of the images below `source`, or of the file; files whose endings are not those of images; folders
        that cannot be read, and why.
    """
    root, folder = Path(source), Path(output)
    if not root.exists():
        raise FileNotFoundError(f'{source}: no such file or folder')
    place = folder if root.is_dir() else folder / result_path(Path(root.name), suffix, extension)
    if not suffix and place.resolve() == root.resolve():
        raise FileExistsError(f'{output}: the results would replace the images; use another folder or --suffix')
    sources, others, closed = find_images(root, folder, suffix)
    if not sources and not closed:
        raise no_pictures(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'{output}: the folder for the results cannot be created: {error.strerror}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{output}: the folder for the results is not writable')
    top = root if root.is_dir() else root.parent
    return ([path.relative_to(top) for path in sources], [str(path) for path in others], [(str(path), reason)
                                                                                          for path, reason in closed])


def no_pictures(source: Union[str, Path]) -> FileNotFoundError:
    """The error of a folder without pictures."""
    return FileNotFoundError(f'{source}: contains no image ({", ".join(EXTENSIONS)})')


def list_jobs(names: Sequence[Path],
              root: str,
              folder: str,
              suffix: str,
              extension: Optional[str],
              handling: Handling,
              exists: Callable[[str], bool],
              shard: tuple[int, int] = (1, 1)) -> Iterator[Job]:
    """What is to be done with each image, in the order of their names.

    Args:
        names: Of the images below `root`.
        root, folder: Folder of the images, and of the results, or their URIs.
        suffix, extension: Of the results; the extension with its dot.
        handling: What is done with the pictures.
        exists: Whether there is a file of a name; asked when the job's turn comes.
        shard: The part of all images, from 1 on, and the number of parts.
    """
    owners: dict[Path, Path] = {}  # of two images whose results would have one name, the first
    for name in names:
        result = result_path(name, suffix, extension)
        for path in (result, map_path(result)) if handling.map else (result, ):
            owners.setdefault(path, name)
    root, folder = ('' if place == os.curdir else place for place in (root, folder))
    for name in names[shard[0] - 1::shard[1]]:
        source, result = os.path.join(root, name), result_path(name, suffix, extension)
        large = result.with_suffix('.tif') if extension is None and result.suffix == '.png' else result
        large = large if owners.get(large, name) == name else result
        target, refused = os.path.join(folder, result), ''
        for path in (result, map_path(result)) if handling.map else (result, ):
            if owners[path] != name and not refused:
                refused = (f'its result would be {os.path.join(folder, path)}, as that of {owners[path].name}; rename '
                           'one of them')
        kept = not (handling.overwrite or refused)
        other = os.path.join(folder, large)
        yield Job(source, target, other, kept and exists(target), kept and large != result and exists(other), refused)


def outcome_of(upscaler: Upscaler, job: Job, handling: Handling, single: bool = False) -> Outcome:
    """Does a job, if it has to be done; an image that fails is no error.

    Args:
        upscaler: The engine.
        job: The job.
        handling: How images are processed.
        single: Whether there is no other job; then memory that does not suffice is an error.
    """
    if job.refused or job.present:
        return Outcome(job.source, job.refused)
    start = time.perf_counter()
    try:
        Path(job.result).parent.mkdir(parents=True, exist_ok=True)
        done = _upscale_file(upscaler, job, handling)
    except ShortOfMemory as error:
        if single and upscaler.memory_limit is not None:
            raise OptionError(f'memory={mib(upscaler.memory_limit.size)}', f'{job.source} {error}') from error
        return Outcome(job.source, str(error))
    # besides missing memory, RuntimeErrors are what a network says of a size that it cannot do
    except (ImageError, OSError, RuntimeError, MemoryError) as error:
        return Outcome(job.source, ' '.join(str(error).split()).removeprefix(f'{job.source}: '))
    if done is None:
        return Outcome(job.source)
    plan, notes = done
    height, width = upscaler.size_of(*plan.size)
    pixels, seconds = height * width, time.perf_counter() - start
    return Outcome(job.source, '', True, pixels, plan.cost * pixels, plan.counts, seconds, notes)


def summary_of(upscaler: Upscaler, outcomes: Iterable[Outcome], total: int, failed: Sequence[Outcome],
               left_out: list[str]) -> Summary:
    """Sums up what becomes of images, as it comes, under a bar.

    Args:
        upscaler: The engine.
        outcomes: Of all pictures.
        total: Number of these.
        failed: Further ones.
        left_out: See Summary.
    """
    done, present, result_pixels, spent, busy = 0, 0, 0, 0., 0.
    counts, failures = [0] * upscaler.num_classes, [(outcome.source, outcome.failed) for outcome in failed]
    notes: list[tuple[str, str]] = []
    begin = time.perf_counter()
    with tqdm(total=total, desc='upscale', disable=None, bar_format=BAR) as bar:
        for outcome in outcomes:
            notes += [(outcome.source, note) for note in outcome.notes]
            if outcome.failed:
                failures.append((outcome.source, outcome.failed))
            elif not outcome.done:
                present += 1
            else:
                done += 1
                result_pixels += outcome.pixels
                spent += outcome.spent
                busy += outcome.seconds
                counts = [number + more for number, more in zip(counts, outcome.counts)]
                bar.set_postfix_str(progress(upscaler, result_pixels / 1e6, busy, counts), refresh=False)
            bar.update()
    seconds = time.perf_counter() - begin
    cost = spent / max(result_pixels, 1)
    limit = upscaler.memory_limit
    memory = (None, None) if limit is None else (limit.size, limit.memory.peak())
    return Summary(done, present, failures, result_pixels / 1e6, seconds, cost, counts, notes, left_out, *memory)


def progress(upscaler: Upscaler, megapixels: float, seconds: float, counts: Sequence[int]) -> str:
    """Text for the progress bar: the speed, and the share of each class."""
    text = f'{megapixels / seconds:.2f} megapixels/s'
    if upscaler.routed:
        shares = '/'.join(f'{100 * number / sum(counts):.0f}' for number in counts)
        text += f', {upscaler.unit.lower()} {shares} %'
    return text


def _looked_at(upscaler: Upscaler, sources: Sequence[Path], max_megapixels: float) -> Iterator[Rows]:
    """Opens all images that can be read; the others are reported when they are processed."""
    for path in tqdm(sources, 'checking', unit='image', disable=None):
        with suppress(ImageError, OSError, MemoryError):
            yield from planned_rows(upscaler, read_image(path, max_megapixels, upscaler.host_limit).pixels)


def _upscale_file(upscaler: Upscaler, job: Job, handling: Handling) -> Optional[tuple[Plan, tuple[str, ...]]]:
    """Upscales one image.

    Returns:
        What was run, and what was not done of the image; None if `large` is wanted and already exists.
    """
    source = Path(job.source)
    picture = read_image(source, handling.max_megapixels, upscaler.host_limit)
    result, large = Path(job.result), Path(job.large)
    fitting = writable_path(upscaler, picture, result, large)
    if fitting != result and job.large_present:
        return None
    rows = upscaler.size_of(*picture.pixels.shape[:2])[0]

    def write(engine: Upscaler) -> tuple[Plan, tuple[str, ...]]:
        with tqdm(total=rows, desc=source.name, unit='row', leave=False, disable=None, delay=2) as bar:
            return write_upscaled(engine, picture, fitting, handling.map, handling.strip_metadata,
                                  lambda strip: bar.update(len(strip)))

    plan, lost = upscaler.in_precision(write)
    return plan, (*picture.notes, *lost)


def writable_path(upscaler: Upscaler, picture: Picture, result: Path, large: Path) -> Path:
    """Returns `result`, or `large` if the format of `result` cannot store the upscaled image.

    Raises:
        ImageError: Neither can.
    """
    height, width, channels = picture.pixels.shape
    shape = (*upscaler.size_of(height, width), channels)
    try:
        check_writable(result, shape, picture.pixels.dtype)
    except ImageError:
        check_writable(large, shape, picture.pixels.dtype)
        return large
    return result


def write_upscaled(upscaler: Upscaler,
                   picture: Picture,
                   result: Path,
                   save_map: bool = False,
                   strip_metadata: bool = False,
                   watch: Callable[[np.ndarray], object] = len,
                   plan: Optional[Plan] = None) -> tuple[Plan, tuple[str, ...]]:
    """Upscales an image into a file, which is written completely or not at all.

    Args:
        upscaler: The engine.
        image: The result of `read_image`.
        result: The file.
        save_map, strip_metadata: See `upscale_files`.
        watch: Called with the strips of the result, each when it is written.
        plan: See `upscaled_strips`.

    Returns:
        What was run, and what the file could not hold.
    """
    height, width, channels = picture.pixels.shape
    shape, dtype = (*upscaler.size_of(height, width), channels), picture.pixels.dtype
    held = picture.pixels.nbytes + bytes_to_write(result, shape, dtype)
    held += save_map * map_bytes(picture.pixels)
    with upscaler.reserving(held):
        plan, strips = upscaled_strips(upscaler, picture.pixels, plan)

    def watched() -> Iterator[np.ndarray]:
        for strip in strips:
            yield strip
            watch(strip)
        if upscaler.memory_limit is not None:
            upscaler.memory_limit.trim()  # the format takes memory now, which strips and tiles have had
        if temporary is not None:  # pixels have their classes now, and the result has no name yet
            save_difficulty_map(temporary, picture.pixels, plan.class_map().numpy(), upscaler.num_classes)

    with ExitStack() as stack:
        # gets its name after the result, but neither if one of them fails
        temporary = stack.enter_context(replace_when_done(map_path(result))) if save_map else None
        metadata = (None, None) if strip_metadata else (picture.exif, picture.xmp)
        return plan, write_image(result, shape, dtype, watched(), picture.icc_profile, *metadata)
