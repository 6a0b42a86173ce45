"""Upscaling files: what `basicsr upscale` does."""
from __future__ import annotations

import numpy as np
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tqdm import tqdm
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, Union

from ..decoding.process import Picture
from ..files import replace_when_done
from ..memory import ShortOfMemory, mib
from ..options import OptionError, check_choice
from ..settings import MAX_MEGAPIXELS, WEIGHED
from .difficulty_map import map_bytes, save_difficulty_map
from .image_io import (
    EXTENSIONS,
    MAX_SIDES,
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
        left_out: Files of the folder that are no images by their endings.
        promised, peak: Bytes of memory that were promised, and that were held at most; None without a promise.
    """
    done: int
    present: int
    failed: list[tuple[str, str]]
    megapixels: float
    seconds: float
    cost: float
    counts: list[int]
    notes: list[tuple[str, str]]
    left_out: list[Path]
    promised: Optional[int] = None
    peak: Optional[int] = None


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


def result_path(source: Path, root: Path, output: Path, suffix: str, extension: Optional[str]) -> Path:
    """Path of a result: subfolders of the input folder are kept; TIFF stays TIFF, every other format becomes PNG.

    What is too large for PNG becomes TIFF too; that is seen when the image has been read.
    """
    folder = output / source.relative_to(root).parent if root.is_dir() else output
    kept = source.suffix if source.suffix.lower() in ('.tif', '.tiff') else '.png'
    return folder / f'{source.stem}{suffix}{extension or kept}'


def map_path(result: Path) -> Path:
    """Path of the difficulty map of a result."""
    return result.with_name(f'{result.stem}_map.png')


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
    if map and not upscaler.routed:
        raise OptionError('map=True', 'needs a network that routes, CDNSR or PCSR')
    root, folder = Path(source), Path(output)
    if not root.exists():
        raise FileNotFoundError(f'{source}: no such file or folder')
    place = folder if root.is_dir() else result_path(root, root, folder, suffix, extension)
    if not suffix and place.resolve() == root.resolve():
        raise FileExistsError(f'{output}: the results would replace the images; use another folder or --suffix')
    sources, others, closed = find_images(root, folder, suffix)
    if not sources and not closed:
        raise FileNotFoundError(f'{source}: contains no image ({", ".join(EXTENSIONS)})')
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'{output}: the folder for the results cannot be created: {error.strerror}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{output}: the folder for the results is not writable')

    owners: dict[Path, Path] = {}  # of two images whose results would have one name, the first
    for path in sources:
        result = result_path(path, root, folder, suffix, extension)
        for name in (result, map_path(result)) if map else (result, ):
            owners.setdefault(name, path)
    done = present = 0
    first = part == 1  # what concerns the whole folder is said once
    failed = [(str(path), f'cannot be listed: {reason}') for path, reason in closed if first]
    notes: list[tuple[str, str]] = []
    begin, result_pixels, spent, counts = time.perf_counter(), 0, 0., [0] * upscaler.num_classes
    busy = 0.  # seconds, without those in which the folder is looked at
    alone = per_picture or len(sources) == 1
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(sources[part - 1::parts], 'upscale', disable=None, bar_format=BAR))
        for path in bar:
            result = result_path(path, root, folder, suffix, extension)
            large = result.with_suffix('.tif') if extension is None and result.suffix == '.png' else result
            try:
                for name in (result, map_path(result)) if map else (result, ):
                    if owners[name] != path:
                        raise ImageError(
                            f'{path}: its result would be {name}, as that of {owners[name].name}; rename one of them')
                plan = None
                if overwrite or not result.exists():
                    result.parent.mkdir(parents=True, exist_ok=True)
                    large = large if owners.get(large, path) == path else result
                    if not alone:  # now, for there is something to do
                        stack.enter_context(upscaler.together(_looked_at(upscaler, sources, max_megapixels), weigh))
                        alone = True
                    start = time.perf_counter()
                    plan = _upscale_file(upscaler, path, result, large, map, overwrite, max_megapixels, strip_metadata,
                                         notes)
                    busy += time.perf_counter() - start
            except ShortOfMemory as error:
                if len(sources) == 1 and upscaler.promise is not None:  # nothing at all is done
                    raise OptionError(f'memory={mib(upscaler.promise.limit)}', f'{path} {error}') from error
                failed.append((str(path), str(error)))
                continue
            # besides missing memory, RuntimeErrors are what a network says of a size that it cannot do
            except (ImageError, OSError, RuntimeError, MemoryError) as error:
                failed.append((str(path), ' '.join(str(error).split()).removeprefix(f'{path}: ')))
                continue
            if plan is None:
                present += 1
                continue
            done += 1
            height, width = upscaler.size_of(*plan.size)
            result_pixels += height * width
            spent += plan.cost * height * width
            counts = [total + more for total, more in zip(counts, plan.counts)]
            bar.set_postfix_str(progress(upscaler, result_pixels / 1e6, busy, counts), refresh=False)
    seconds = time.perf_counter() - begin
    cost = spent / max(result_pixels, 1)
    memory = (None, None) if upscaler.promise is None else (upscaler.promise.limit, upscaler.promise.memory.peak())
    left_out = others if first else []
    return Summary(done, present, failed, result_pixels / 1e6, seconds, cost, counts, notes, left_out, *memory)


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
            yield from planned_rows(upscaler, read_image(path, max_megapixels, upscaler.promise_of_host).pixels)


def _upscale_file(upscaler: Upscaler, path: Path, result: Path, large: Path, save_map: bool, overwrite: bool,
                  max_megapixels: float, strip_metadata: bool, notes: list[tuple[str, str]]) -> Optional[Plan]:
    """Upscales one image to `result`, or to `large` if the format of `result` cannot store it.

    What is not done of it is added to `notes`.

    Returns:
        What was run; None if `large` is wanted and already exists.
    """
    picture = read_image(path, max_megapixels, upscaler.promise_of_host)
    fitting = writable_path(upscaler, picture, result, large)
    if fitting != result and fitting.exists() and not overwrite:
        return None
    rows = upscaler.size_of(*picture.pixels.shape[:2])[0]

    def write(engine: Upscaler) -> tuple[Plan, tuple[str, ...]]:
        with tqdm(total=rows, desc=path.name, unit='row', leave=False, disable=None, delay=2) as bar:
            return write_upscaled(engine, picture, fitting, save_map, strip_metadata,
                                  lambda strip: bar.update(len(strip)))

    plan, lost = upscaler.in_precision(write)
    notes.extend((str(path), note) for note in (*picture.notes, *lost))
    return plan


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
        picture: The result of `read_image`.
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
        if upscaler.promise is not None:
            upscaler.promise.trim()  # the format takes memory now, which strips and tiles have had
        if temporary is not None:  # pixels have their classes now, and the result has no name yet
            save_difficulty_map(temporary, picture.pixels, plan.class_map().numpy(), upscaler.num_classes)

    with ExitStack() as stack:
        # gets its name after the result, but neither if one of them fails
        temporary = stack.enter_context(replace_when_done(map_path(result))) if save_map else None
        metadata = (None, None) if strip_metadata else (picture.exif, picture.xmp)
        return plan, write_image(result, shape, dtype, watched(), picture.icc_profile, *metadata)
