"""Upscaling a whole image tile by tile, each tile by the branch that its difficulty asks for."""
from __future__ import annotations

import time
import torch
from torch import nn
from typing import NamedTuple

from ..complexity import count_macs
from .tiling import Tiling


class Upscaled(NamedTuple):
    """An upscaled image and how it came about.

    Attributes:
        image: of shape (1, c, h * scale, w * scale), on the network's device.
        classes: of shape (n, ), class of each tile, on CPU.
        tiling: The tiles, numbered as in `classes`.
        cost: MACs spent, classifier and tile overlap included, relative to the dearest branch on the whole image.
        seconds: Wall time.
    """
    image: torch.Tensor
    classes: torch.Tensor
    tiling: Tiling
    cost: float
    seconds: float


class RoutedUpscaler:
    """Cuts an image into tiles, classifies them all, runs each class through its branch, blends the results.

    Args:
        net: A CDNSR network (attributes classifier, branches, upscale).
        patch_size: Side of a tile in LR pixels.
        step: Distance of neighbouring tiles in LR pixels.
        batch: Tiles per forward pass; bounds the memory taken.

    Attributes:
        branch_macs: MACs of each branch for one tile.
        classifier_macs: MACs of the classifier for one tile.
    """

    def __init__(self, net: nn.Module, patch_size: int = 64, step: int = 60, batch: int = 8) -> None:
        self.net, self.patch_size, self.step, self.batch = net, patch_size, step, batch
        self.classifier_macs = count_macs(net.classifier, patch_size, patch_size)
        self.branch_macs = [count_macs(branch, patch_size, patch_size) for branch in net.branches]

    @property
    def costs(self) -> torch.Tensor:
        """Cost of each branch relative to the dearest, of shape (M, )."""
        macs = torch.tensor(self.branch_macs, dtype=torch.float32)
        return macs / macs.max().clamp(min=1)

    @torch.no_grad()
    def upscale(self, lq: torch.Tensor) -> Upscaled:
        """Upscales one image.

        Args:
            lq: of shape (1, c, h, w), in [0, 1], h and w at least 1, on the network's device.
        """
        if lq.dim() != 4 or lq.shape[0] != 1:
            raise ValueError(f'Expected one image of shape (1, c, h, w), but got {tuple(lq.shape)}.')
        begin = time.perf_counter()
        tiling = Tiling(lq.shape[2], lq.shape[3], self.patch_size, self.step)
        tiles = tiling.cut(lq[0])
        logits = torch.cat([self.net.classifier(chunk) for chunk in tiles.split(self.batch)])
        classes = logits.argmax(dim=1)
        size = self.patch_size * self.net.upscale
        upscaled = tiles.new_empty(len(tiles), tiles.shape[1], size, size)
        for i, branch in enumerate(self.net.branches):
            for index in (classes == i).nonzero().squeeze(1).split(self.batch):
                if index.numel() > 0:
                    upscaled[index] = branch(tiles[index])
        image = tiling.blend(upscaled, self.net.upscale).unsqueeze(0)
        classes = classes.cpu()
        return Upscaled(image, classes, tiling, self.cost(classes, tiling), time.perf_counter() - begin)

    def cost(self, classes: torch.Tensor, tiling: Tiling) -> float:
        """MACs of these tiles, classifier included, relative to the dearest branch on the image without tiles."""
        spent = len(tiling) * self.classifier_macs + sum(self.branch_macs[i] for i in classes.tolist())
        dearest_per_pixel = max(self.branch_macs) / self.patch_size**2
        return spent / max(dearest_per_pixel * tiling.height * tiling.width, 1)
