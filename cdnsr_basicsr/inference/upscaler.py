"""What all engines have in common: a network on a device, in a form that is fast, that upscales one image."""
from __future__ import annotations

import copy
import itertools
import logging
import numpy as np
import time
import torch
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from torch import nn
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Protocol, TypeVar

from .difficulty_map import draw_over
from .network import Weights, device_of, same_weights, weights_of
from .pictures import NotFinite, opened, upscaled_strips
from .speed import Speed, kind_of
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
        """MACs spent, relative to the dearest branch on the whole image without tiles."""

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
        """MACs spent, classifier and overlap included, relative to the dearest branch on the whole image."""
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
        step: patch_size less the overlap of neighbouring tiles.
        budget: Cost that may be spent on an image, as a fraction of the dearest branch's on the whole image without
            tiles. Default: no limit.
        dtypes: Precision of each branch.
        max_tiles: Most tiles per forward pass. Default: the engine's choice.

    Attributes:
        routed: Whether there are classes to choose from.
        num_classes: Number of classes M.
        device, kind: Where the network is, and whether that is 'cuda' or 'cpu'.
        unit: What gets a class.
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
        self.watch: Callable[[float], None] = lambda share: None

    @abstractmethod
    def _copy(self) -> None:
        """Makes the fast copy of the network."""

    @abstractmethod
    def plan(self, image: Rows) -> Plan:
        """Decides what is done with an image, as far as that is known before."""

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
        """MACs of the dearest branch on a whole image, per pixel of the result."""

    def refresh(self) -> None:
        """Takes over the network's weights at the next image, whatever their versions say."""
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
            say('Values overflow in this precision: images that have them are done again in float32.')
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
            The result, of the image's kind; of a path an array like the picture in the file, uint8 or uint16.

        Raises:
            OptionError: It is none of these.
            ImageError: The file cannot be read, or the network makes values of it that are no finite numbers.
        """
        begin = time.perf_counter()
        if isinstance(image, torch.Tensor):
            rows = TensorRows(image)
            plan = self.plan(rows) if plan is None else plan
            return Upscaled(self._image(rows, plan), plan, time.perf_counter() - begin, image)
        picture = opened(image)

        def run(engine: Upscaler) -> tuple[Plan, np.ndarray]:
            plan, strips = upscaled_strips(engine, picture.pixels)
            return plan, np.concatenate(list(strips))

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
        """Upscales a picture file, or all pictures of a folder, into a folder.

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
        if not self.short_of_memory:
            say('Out of memory: going on with smaller batches.')
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


def to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of an image on a device; to a GPU without waiting."""
    if rows.device == device:
        return rows
    if device.type != 'cuda':
        return rows.to(device)
    if rows.device.type == 'cpu':
        rows = rows.contiguous().pin_memory()  # of an expanded tensor, or one within a larger, too much is pinned
    return rows.to(device, non_blocking=True)
