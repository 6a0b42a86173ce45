"""What all engines have in common: a network on a device, in a form that is fast, that upscales one image."""
from __future__ import annotations

import copy
import itertools
import logging
import math
import numpy as np
import time
import torch
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from torch import nn
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Protocol, TypeVar

from ..memory import MemoryLimit
from .difficulty_map import draw_over
from .network import Weights, device_of, same_weights, weights_of
from .pictures import NotFinite, opened, upscaled_strips
from .speed import Speed, is_out_of_memory, kind_of
from .tiling import Rows, TensorRows

Result = TypeVar('Result')


class Plan(Protocol):
    """What is done with an image. Engines that decide while they run know all of it when the last strip is done."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""

    @property
    def counts(self) -> list[int]:
        """Tiles, or pixels of the result, of each class."""

    @property
    def cost(self) -> float:
        """MACs spent, relative to the most expensive branch on the whole image without tiles."""

    def class_map(self) -> torch.Tensor:
        """Class of each LR pixel, of shape (h, w), on the CPU."""


class Upscaled(NamedTuple):
    """An upscaled image and how it came about.

    Attributes:
        image: The result, of the kind of the image: of a tensor one of shape (1, c, h * scale, w * scale), float32, on
            the network's device.
        plan: What was done.
        seconds: Wall time.
        source: The image.
    """
    image: Any
    plan: Any
    seconds: float
    source: Any

    @property
    def cost(self) -> float:
        """MACs spent, classifier and overlap included, relative to the most expensive branch on the whole image."""
        return float(self.plan.cost)

    @property
    def counts(self) -> list[int]:
        """Tiles, or pixels of the result, of each class."""
        return list(self.plan.counts)

    @property
    def classes(self) -> np.ndarray:
        """Class of each pixel of the image, 0 being the easiest, of shape (h, w), uint8."""
        return np.asarray(self.plan.class_map(), np.uint8)

    def map(self) -> np.ndarray:
        """The image coloured by class, green to red, above a legend; of shape (H, W, 3), uint8, RGB."""
        return draw_over(opened(self.source).pixels, self.classes, len(self.counts))[..., ::-1]


class Upscaler(ABC):
    """Upscales images of any size by a network.

    The network is copied in a form that is fast in inference, and again when its weights have changed. Changes that
    leave their versions alone (fused optimizers, `.data`) need a call of `refresh`.

    Args:
        net: The network, on its device.
        scale: Upsampling factor.
        channels: Channels of the images: 3, or 1 for gray.
        patch_size: Largest side of a tile in LR pixels.
        step: patch_size minus the overlap of neighbouring tiles.
        budget: Largest cost of an image, as a fraction of the most expensive branch's on the whole image without tiles.
            Default: no limit.
        dtypes: Precision of each branch.
        max_tiles: Most tiles per forward pass. Default: the engine's choice.

    Attributes:
        routed: Whether there are classes to choose from.
        num_classes: Number of classes M.
        device, kind: Where the network is, and whether that is 'cuda' or 'cpu'.
        unit: What gets a class.
        memory_limit: Of `limit_memory`; `upscale` and `upscale_folder` stay below it.
        watch: Called with the share of an image that is done, between its blocks; what it raises stops the image.
    """
    unit: str
    num_classes: int
    routed: bool

    def __init__(self, net: nn.Module, scale: float, channels: int, patch_size: int, step: int, budget: Optional[float],
                 dtypes: list[torch.dtype], max_tiles: Optional[int]) -> None:
        if not 1 <= step <= patch_size:
            raise ValueError(f'expected a step from 1 to the patch size, {patch_size}, but got {step}')
        self.net, self.scale, self.channels = net, scale, channels
        self.patch_size, self.step, self.budget = patch_size, step, budget
        self.dtypes, self.max_tiles = dtypes, max_tiles
        self.device = device_of(net)
        self.kind = kind_of(self.device)
        self.copied: Optional[Weights] = None  # the weights of the copy, and their versions
        self.exact: Optional[Upscaler] = None  # the same in float32, once that is wanted
        self.measured: Optional[Speed] = None
        self.short_of_memory = False
        self.known_to_fit: dict[str, int] = {}  # what is done at once, less than is usual, by what it is
        self.memory_limit: Optional[MemoryLimit] = None
        self.watch: Callable[[float], None] = lambda share: None

    @abstractmethod
    def _copy(self) -> None:
        """Makes the fast copy of the network."""

    def limit_memory(self, memory_limit: MemoryLimit) -> None:
        """Stays below a limit of memory from now on: images are planned accordingly.

        Raises:
            ShortOfMemory: It cannot be kept with any image.
        """
        self.memory_limit = memory_limit
        self._update()
        least = self._least_bytes()
        if least > memory_limit.free():
            raise memory_limit.short_of(least, 'the smallest tile')

    @abstractmethod
    def _least_bytes(self) -> int:
        """What the smallest forward pass takes."""

    def _ask_for(self, size: float, what: str) -> None:
        """Makes room for what a forward pass takes, if memory is limited.

        Args:
            size: Bytes.
            what: For what they are.

        Raises:
            ShortOfMemory: There is none.
        """
        if self.memory_limit is not None and not self.memory_limit.has_room(int(size)):
            raise self.memory_limit.short_of(int(size), what)

    def reserving(self, size: int) -> AbstractContextManager[object]:
        """Context in which so many bytes, of the memory that images are read and written in, are not planned with."""
        memory_limit = self.host_limit
        return nullcontext() if memory_limit is None else memory_limit.reserving(size)

    def beside(self, images: int) -> AbstractContextManager[object]:
        """Context in which that many images are planned, to be upscaled side by side."""
        return nullcontext() if self.memory_limit is None else self.memory_limit.shared_by(images)

    @property
    def host_limit(self) -> Optional[MemoryLimit]:
        """The limit, if it is one of the memory that images are read and written in."""
        return self.memory_limit if self.memory_limit is not None and self.memory_limit.of_host else None

    @abstractmethod
    def plan(self, image: Rows) -> Plan:
        """Plans an image, as far as that is possible before it is upscaled."""

    def limited_to(self, **limits: float) -> Upscaler:
        """The same engine, of the same network and measurements, under another limit; it has a `watch` of its own.

        Args:
            limits: One of budget, target_ms, max_loss and fidelity; see TileUpscaler. Default: no limit.

        Raises:
            ValueError: The engine has no such limit.
        """
        self._update()
        other = copy.copy(self)
        other.exact, other.watch = None, lambda share: None
        other._take_limits(**limits)
        return other

    @property
    def shares_price(self) -> bool:
        """Whether images that are upscaled `together` have one price."""
        return False

    @abstractmethod
    def _take_limits(self,
                     budget: Optional[float] = None,
                     target_ms: Optional[float] = None,
                     max_loss: Optional[float] = None,
                     fidelity: Optional[float] = None) -> None:
        """Takes limits in the place of those that it has."""

    @contextmanager
    def together(self, images: Iterable[Rows], weigh: str = 'pixels') -> Iterator[None]:
        """Lets images keep to the limit together, whatever each of them takes: they have one price, the one at which
        they do. Where no errors are predicted, each keeps to it by itself.

        Args:
            images: All that is upscaled meanwhile; of each the predicted errors are kept.
            weigh: What counts alike: 'pixels', the squared errors of all pixels together; or 'pictures', the decibels
                of all images, so that one that is easy on the whole gets more.
        """
        yield

    @abstractmethod
    def strips(self, image: Rows, plan: Any) -> Iterator[torch.Tensor]:
        """Upscales an image as planned, strip by strip.

        Yields:
            Finished rows of the upscaled image, from top to bottom, of shape (rows, width, c), float32, on the
            network's device. Each may be overwritten when the next one is asked for.
        """

    @property
    @abstractmethod
    def whole_macs(self) -> float:
        """MACs of the most expensive branch on a whole image, per pixel of the result."""

    def refresh(self) -> None:
        """Copies the network's weights again at the next image, even if their versions have not changed."""
        self.copied = None

    def _update(self) -> None:
        """Takes over the network's present weights, if they have changed."""
        state = weights_of(self.net)
        if self.copied is None or not same_weights(state, self.copied):
            self._copy()
            self.copied = state

    def in_precision(self, run: Callable[[Upscaler], Result]) -> Result:
        """Runs something with this engine and, if its precision cannot hold the image, with the same in float32.

        The second time is said once.

        Raises:
            NotFinite: The image cannot be held in float32 either.
        """
        try:
            return run(self)
        except NotFinite:
            if all(dtype == torch.float32 for dtype in self.dtypes):
                raise
        if self.exact is None:
            say('Values overflow in this precision: such images are computed again in float32.')
            self.exact = copy.copy(self)
            self.exact.dtypes = [torch.float32] * len(self.dtypes)
            self.exact.measured = None
            self.exact.refresh()
        return run(self.exact)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def upscale(self, image: Any, plan: Optional[Plan] = None) -> Upscaled:
        """Upscales one image.

        Args:
            image: A path, a PIL image, an array (h, w) or (h, w, c) with 1 to 4 channels, gray or RGB, the last of 2 or
                4 being alpha, uint8, uint16 or float in [0, 1]; or a tensor (1, c, h, w) in [0, 1] with the network's
                channels.
            plan: What is to be done with a tensor, from `plan`. Default: that is decided here.

        Returns:
            The result, of the image's kind; of a path an array like the image in the file, uint8 or uint16.

        Raises:
            OptionError: It is none of these.
            ImageError: The file cannot be read, or the network makes values of it that are no finite numbers.
        """
        begin = time.perf_counter()
        if isinstance(image, torch.Tensor):
            rows = TensorRows(image)
            if plan is None:
                height, width = self.size_of(rows.height, rows.width)
                with self.reserving(4 * self.channels * height * width):
                    plan = self.plan(rows)
            return Upscaled(self._image(rows, plan), plan, time.perf_counter() - begin, image)
        picture = opened(image, self.host_limit)

        height, width, channels = picture.pixels.shape
        shape = (*self.size_of(height, width), channels)
        held = math.prod(shape) * picture.pixels.itemsize + picture.mapped_bytes

        def run(engine: Upscaler) -> tuple[Plan, np.ndarray]:
            with engine.reserving(held):
                plan, strips = upscaled_strips(engine, picture.pixels)
            pixels, top = np.empty(shape, picture.pixels.dtype), 0
            for strip in strips:
                pixels[top:top + len(strip)] = strip
                top += len(strip)
            return plan, pixels

        plan, pixels = self.in_precision(run)
        return Upscaled(picture.like(pixels), plan, time.perf_counter() - begin, image)

    @torch.inference_mode()
    def _image(self, rows: TensorRows, plan: Plan) -> torch.Tensor:
        """All strips of an image together, of shape (1, c, H, W)."""
        strips, top = self.strips(rows, plan), 0
        image = strip = next(strips)
        if len(strip) < plan.out_size[0]:  # else it is the only one, which no further one overwrites
            image = strip.new_empty(plan.out_size[0], *strip.shape[1:])
            for strip in itertools.chain([strip], strips):
                image[top:top + len(strip)] = strip
                top += len(strip)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)  # once per image, for an honest time
        return image.permute(2, 0, 1).unsqueeze(0)

    def upscale_folder(self, source: str | Path, output: str | Path, **kwargs: Any) -> Any:
        """Upscales an image file, or all images of a folder, into a folder.

        Args:
            source, output: The file or folder, and the folder of the results.
            suffix, ext, map, overwrite, shard, max_megapixels, strip_metadata, per_picture, weigh: See `upscale_files`;
                as the command has them.

        Returns:
            Summary: What was done, and what failed.
        """
        from .upscale import upscale_files
        return upscale_files(self, source, output, **kwargs)

    def _save_memory(self, max_tiles: int) -> None:
        """Goes on with at most so many tiles per forward pass, also for further images; says so once."""
        self.max_tiles = max_tiles if self.max_tiles is None else min(max_tiles, self.max_tiles)
        self._give_memory_back()

    def _in_parts(self,
                  what: str,
                  run: Callable[[int, int], Result],
                  count: int,
                  most: int,
                  unit: int = 1) -> Iterator[Result]:
        """Does something to rows or tiles, to many at once; to fewer, also of further images, if memory does not
        suffice.

        Args:
            what: What it is, by a name of its own.
            run: Does it, from a number to the one behind the last.
            count: How many there are.
            most: How many at once, if memory suffices; a multiple of `unit`.
            unit: What the first number of each part is a multiple of.

        Yields:
            What was made of each part.
        """
        first, most = 0, min(most, self.known_to_fit.get(what, most))
        while first < count:
            last, made = min(first + most, count), None
            try:
                made = run(first, last)
            except RuntimeError as error:
                if last - first <= unit or not is_out_of_memory(error):
                    raise
            if made is None:  # not above, where the error still holds what has been allocated
                most = self.known_to_fit[what] = max(unit, (last - first) // 2 // unit * unit)
                self._give_memory_back()
                continue
            first = last
            yield made

    def _give_memory_back(self) -> None:
        """Lets go of what torch keeps of a GPU's memory, after a shortage; says once that there was one."""
        if not self.short_of_memory:
            say('Out of memory: continuing with smaller batches.')
        self.short_of_memory = True
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """Says something that the user has to know of, once."""
    logging.getLogger('basicsr').warning(text)


@contextmanager
def algorithm_search(wanted: bool) -> Iterator[None]:
    """Context with or without cuDNN's search for the fastest algorithm, which begins anew for every size of tiles."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
