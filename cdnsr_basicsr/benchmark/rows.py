"""Settings and rows of a benchmark, and the figures of each row."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

from ..inference.runtime import precisions as precisions_of

# patch size and step of a loop over tiles, if they are not those of the run; ClassSR's and CDNSR's training size
LOOPS = {'loop': None, 'published loop': (32, 28)}
ROUTED = ('routed', 'oracle', *LOOPS)  # kinds of rows that run all branches


@dataclass(frozen=True)
class Settings:
    """What is compared, and how.

    Attributes:
        models: Checkpoints, or option files that name one.
        data: Folder of photographs; see read_pairs.
        budgets: Budgets of networks with branches, besides the published rule.
        precisions: Precisions of all rows but BasicSR's.
        repeat: Timed runs of each row and photograph, after one that is not; 0: no times.
        limit: Most photographs. Default: all.
        patch_size: Largest side of a tile. Default: the engine's.
        step: patch_size minus the overlap of tiles.
        device: Where to run.
        backends: What is to run tiled and routed rows, those other than torch on the CPU; where one has no such
            precision, the row is left out.
        oracle: Whether to route by true errors too, at each budget; where a classifier maps errors, at its price too.
        branches: Whether to measure each branch alone too, and bicubic upsampling.
        cost: 'macs' | 'latency': what a budget counts. Default: see Settings.
        with_ssim: Whether to compute SSIM.
        singles: Networks without branches to set beside the models: named as these, but on whole images only.
    """
    models: Sequence[str]
    data: str
    budgets: Sequence[float] = ()
    precisions: Sequence[str] = ('float32', )
    repeat: int = 3
    limit: Optional[int] = None
    patch_size: Optional[int] = None
    step: Optional[int] = None
    device: str = 'cpu'
    backends: Sequence[str] = ('torch', )
    oracle: bool = False
    branches: bool = False
    cost: Optional[str] = None
    with_ssim: bool = True
    singles: Sequence[str] = ()


class Network(NamedTuple):
    """What decides which rows a network has, and which networks can be compared.

    Attributes:
        scale: Upsampling factor.
        channels: Channels of the images: 3, or 1 for gray.
        num_branches: Branches that tiles are routed to, 0 for a network without.
        routes_pixels: Whether it routes pixels.
        maps_errors: Whether its classifier maps errors, as an ErrorMap does.
    """
    scale: float
    channels: int
    num_branches: int = 0
    routes_pixels: bool = False
    maps_errors: bool = False


class Row(NamedTuple):
    """One way to upscale.

    Attributes:
        model: Checkpoint, or option file that names one.
        kind: 'whole': one branch, or a network without branches, on the whole image. 'bicubic': bicubic upsampling.
            'loop', 'published loop': one tile at a time. 'tiled': as 'whole', in tiles. 'routed': each tile by its
            branch, each pixel by its sampler. 'oracle': as 'routed', by the branches' true errors instead of the
            classifier's word.
        tuned: Whether it gets what the engine has: channels last, freed memory kept, fast forms of layers, precision.
        precision: Of the branches.
        budget: Of the routing.
        backend: What runs the network: 'torch', 'onnxruntime' or 'openvino'.
        branch: Which branch is 'whole' or 'tiled'. Default: the hardest.
    """
    model: str
    kind: str
    tuned: bool
    precision: str = 'float32'
    budget: Optional[float] = None
    backend: str = 'torch'
    branch: Optional[int] = None

    @property
    def name(self) -> str:
        alone = '' if self.branch is None else f'branch {self.branch + 1}, '
        if self.kind == 'whole':
            return alone + ('whole image, tuned' if self.tuned else 'whole image (BasicSR)')
        if self.kind in LOOPS:
            return 'one tile at a time' + (', 32/28' if LOOPS[self.kind] else '')
        name = alone + (self.kind if self.budget is None else f'{self.kind}, budget {self.budget:g}')
        return name if self.backend == 'torch' else f'{name} ({self.backend})'


class Measured(NamedTuple):
    """What was measured of a row; NaN where memory did not suffice.

    Attributes:
        row: The row.
        network: Type of the network.
        psnr, ssim: Means over the photographs, of RGB, or of the luma of networks for gray images, `scale` pixels of
            border left out; NaN if a result is not finite.
        pooled: PSNR of all these pixels of all photographs together.
        kmacs: Thousand MACs per pixel of the result, classifier and tile overlap included.
        patch_mflops: The papers' convention: million FLOPs (2 per MAC, transposed convs at their output size) per patch
            of 32x32, averaged over the tiles; of the branches alone, without classifier and overlap.
        ms: Median time in milliseconds per megapixel of the result.
        speed: How many times as fast as the first row of the model.
        peak_mib: Most memory in use, in MiB: of the process, on a GPU of its tensors.
        shares: Part of the tiles, or pixels, in each class, in percent.
        psnr_y: As psnr, of the Y channel, as papers have it.
    """
    row: Row
    network: str
    psnr: float
    pooled: float
    ssim: float
    kmacs: float
    patch_mflops: float
    ms: float
    speed: float
    peak_mib: float
    shares: list[float]
    psnr_y: float = float('nan')


def rows_of(settings: Settings, model: str, network: Network) -> list[Row]:
    """The rows of a model; the first is what the others are compared with.

    Whole images, and what routes pixels, are torch's.
    """
    precisions, tiles, pixels = settings.precisions, network.num_branches > 0, network.routes_pixels
    rows = [Row(model, 'whole', tuned=False)]
    rows += [Row(model, 'whole', True, precision) for precision in precisions]
    if model not in settings.models:  # a single network
        return rows
    if tiles:
        rows += [Row(model, kind, tuned=False) for kind in LOOPS]
    limits: dict[str, Sequence[Optional[float]]] = {} if pixels else {'tiled': [None]}
    if tiles or pixels:
        limits['routed'] = [None, *settings.budgets]
    backends = ['torch'] if pixels else settings.backends
    for kind, budgets in limits.items():
        rows += [
            Row(model, kind, True, precision, budget, backend) for precision in precisions for budget in budgets
            for backend in backends if precision in precisions_of(backend)
        ]
    if tiles and settings.branches:
        rows.append(Row(model, 'bicubic', True))
        for i in range(network.num_branches):
            rows.append(Row(model, 'whole', tuned=False, branch=i))
            rows += [
                Row(model, kind, True, precision, branch=i) for kind in ('whole', 'tiled') for precision in precisions
            ]
    if tiles and settings.oracle:
        budgets = limits['routed'] if network.maps_errors else settings.budgets
        rows += [Row(model, 'oracle', True, precisions[0], budget) for budget in budgets]
    return rows
