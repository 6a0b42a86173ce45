"""The settings of a run: the arguments of `load`, and of the commands that upscale."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Optional

from .options import OptionError, check_choice

LIMITS = ('budget', 'target_ms', 'max_loss', 'fidelity')
COSTS = ('macs', 'latency')
BACKENDS = ('torch', 'onnxruntime', 'openvino')
PRECISIONS = ('float32', 'bfloat16', 'float16')
WEIGHED = ('pixels', 'pictures')
MAX_MEGAPIXELS = 1000  # larger images are refused
AUTO = 'auto'  # of memory: most of what is free
UNITS = {'M': 2**20, 'G': 2**30}


@dataclass(frozen=True)
class Settings:
    """Which network upscales, how, and what it may spend.

    Attributes:
        model: Checkpoint of the network, a name of `basicsr models`, or a folder that `basicsr export` has written.
        opt: Option file that describes the model, if it does not do so itself, or names it at path.pretrain_network_g.
        backend: 'torch' | 'onnxruntime' | 'openvino': what runs the network. Default: 'torch'; of an exported network
            OpenVINO or ONNX Runtime, whichever is installed.
        budget: Cost of an image, as a fraction of the hardest branch's on the whole image; classifier and tile overlap
            count. Default: no limit, each tile gets its most probable branch.
        target_ms: Time of an image in milliseconds instead, by measured speed.
        max_loss: PSNR that an image may lose against the hardest branch, in dB, as a router that predicts errors
            predicts it, instead: it costs no more than that needs.
        fidelity: PSNR relative to the hardest branch's image that an image has to have, in dB, likewise, of a router
            that has learnt from that image.
        cost: 'macs' | 'latency': what a budget counts. Default: time where the branches are of different archs, whose
            operations say little; else macs.
        scale: Upsampling factor of a PCSR network, such as 2.5. Default: its own.
        precision: 'float32' | 'bfloat16' | 'float16': of the branches.
        patch_size: Largest side of a tile in LR pixels. Default: 96; 68 for a router that maps errors, 128 for PCSR.
        step: Patch size less the overlap of tiles. Default: 4 less; 8 for a network without branches, 12 for PCSR.
        device: 'cpu', 'cuda', 'cuda:1' ... Default: a GPU if there is one.
        memory: What the process may hold at most, such as '4G', or 'auto', three quarters of what is free.
            Default: no limit.
        threads: Threads that compute, of the whole process. Default: torch's and OpenCV's own choice.

    Raises:
        OptionError: One of them is out of range, or they do not go together.
    """
    model: Optional[str] = None
    opt: Optional[str] = None
    backend: Optional[str] = None
    budget: Optional[float] = None
    target_ms: Optional[float] = None
    max_loss: Optional[float] = None
    fidelity: Optional[float] = None
    cost: Optional[str] = None
    scale: Optional[float] = None
    precision: str = 'float32'
    patch_size: Optional[int] = None
    step: Optional[int] = None
    device: Optional[str] = None
    memory: Optional[str] = None
    threads: Optional[int] = None

    def __post_init__(self) -> None:
        for name in (*LIMITS, 'scale'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise OptionError(f'{name}={value}', 'expected a number above 0')
        for name in ('patch_size', 'step', 'threads'):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f'{name}={value}', 'expected an integer of at least 1')
        for name, accepted in (('cost', (None, *COSTS)), ('backend', (None, *BACKENDS)), ('precision', PRECISIONS)):
            check_choice(getattr(self, name), name, accepted)
        if self.memory not in (None, AUTO):
            bytes_of(self.memory)
        limits = [name for name in LIMITS if getattr(self, name) is not None]
        if len(limits) > 1:
            raise OptionError(f'{limits[1]}={getattr(self, limits[1])}', f'cannot be combined with {limits[0]}')
        if self.cost == 'latency' and self.budget is None:
            raise OptionError('cost=latency', 'requires a budget')
        if not self.model and not self.opt:
            raise OptionError('model', 'a checkpoint is needed, its name, or an option file that names one')


def bytes_of(memory: object) -> int:
    """The number of bytes of a size such as '4G', '4GiB', '1.5G' or '512M'; G and M are powers of 1024.

    Raises:
        OptionError: It is not a size.
    """
    match = re.fullmatch(r'(\d+|\d+\.\d+)([MG])(iB)?', memory, re.IGNORECASE) if isinstance(memory, str) else None
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not size:
        raise OptionError(f'memory={memory}', 'expected a size such as 4G, 4GiB or 512M, or auto')
    return size
