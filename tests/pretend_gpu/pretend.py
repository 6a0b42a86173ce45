"""A GPU that is not there: tensors that say cuda:0 and whose values are on the CPU, where all is computed.

Streams, events, pinned memory, autocast and autograd are torch's own, on the runtime of shim.cpp, which has to be
preloaded. What a GPU does differently from a CPU is pretended, and noticed:

- the host waits, for a value or for a copy from or to memory that is not pinned: `seen.waits`, by what and where;
- a copy to pinned memory arrives when an event after it, or the device, has been waited for; until then there is -99;
- a copy from pinned memory takes what is there when the device gets to it: it must not be changed (`seen.races`);
- a tensor that was made on one stream and is used on another must have been recorded there (`seen.strays`);
- operations on tensors of both devices are errors;
- with a `limit`, memory runs out.
"""
from __future__ import annotations

import os
import sys
import torch
import weakref
from collections import Counter
from contextlib import contextmanager
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device('cuda', 0)
NOT_YET = -99  # what a copy's destination holds before it arrives; 157 as uint8

# operations whose result is a value, or whose size depends on one
WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.bincount.default, aten._unique2.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor
}
VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
COPYING = {aten.copy_.default, aten._to_copy.default}


class Seen:
    """What was noticed since `clear`.

    Attributes:
        waits: How often the host waited, by what for and the line that was at fault.
        races: Lines whose copies' sources were changed too early.
        strays: Lines that used a tensor of another stream.
        bytes, peak: Memory of the tensors that are there, and the most since `clear`.
        limit: Of memory, in bytes.
    """

    def __init__(self) -> None:
        self.waits: Counter = Counter()
        self.races: Counter = Counter()
        self.strays: Counter = Counter()
        self.shortages = self.bytes = self.peak = 0
        self.limit = float('inf')
        self.uses: Counter = Counter()  # of each storage, by tensors

    def clear(self) -> None:
        arrive()
        for counter in (self.waits, self.races, self.strays):
            counter.clear()
        self.shortages, self.peak = 0, self.bytes

    def wait(self, what: str) -> None:
        self.waits[f'{what} at {where()}'] += 1

    def take(self, tensor: Pretended) -> None:
        storage = tensor.values.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.uses[key]:
            if self.bytes + size > self.limit:
                self.shortages += 1
                raise torch.OutOfMemoryError('CUDA out of memory. This GPU is pretended.')
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.uses[key] += 1
        weakref.finalize(tensor, self.give_back, key, size).atexit = False

    def give_back(self, key: int, size: int) -> None:
        self.uses[key] -= 1
        if not self.uses[key]:
            del self.uses[key]
            self.bytes -= size


seen = Seen()
on_their_way: list = []  # copies: destination or source in pinned memory, the value, the line, whether to the host
delayed = 0  # copies that have ever been on their way


def where() -> str:
    """The line of the package, or else of BasicSR or torch, that the present operation is of."""
    frame, other = sys._getframe(1), ''
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if '/cdnsr_basicsr/' in name:
            return f'{name.rsplit("/cdnsr_basicsr/", 1)[1]}:{line}'
        if not other and ('/basicsr/' in name or '/torch/optim/' in name or '/torch/amp/' in name):
            other = f'{name.rsplit("/site-packages/", 1)[-1]}:{line}'
        frame = frame.f_back
    return other or 'elsewhere'


def arrive(until: float = float('inf')) -> None:
    """Lets copies arrive that were on their way before."""
    while on_their_way and on_their_way[0][0] <= until:
        _, host, value, line, to_host = on_their_way.pop(0)
        if to_host:
            host.copy_(value)
        elif not torch.equal(host.view(torch.uint8), value.view(torch.uint8)):
            seen.races[line] += 1


def send(host: torch.Tensor, value: torch.Tensor, to_host: bool) -> None:
    """Has a copy on its way, that nobody waits for."""
    global delayed
    delayed += 1
    on_their_way.append((delayed, host, value.clone().contiguous(), where(), to_host))
    if to_host:
        host.fill_(NOT_YET % 256 if host.dtype == torch.uint8 else NOT_YET)


class Event(torch.cuda.Event):

    def record(self, stream=None):
        self.after = delayed
        return super().record(*() if stream is None else (stream, ))

    def synchronize(self):
        seen.wait('event')
        arrive(self.after)
        return super().synchronize()


def synchronize(device=None, original=torch.cuda.synchronize):
    seen.wait('synchronize')
    arrive()
    original(device)


class Pretended(torch.Tensor):
    """A tensor on the GPU; `values` are its values, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE)
        made.values, made.stream = values, torch.cuda.current_stream().cuda_stream
        seen.take(made)
        return made

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = made = Pretended(self.values.detach().clone())
            if getattr(self, '_is_param', False):
                made._is_param = True
            made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # saved as a file that is loaded onto a CPU
        return self.values.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f'Pretended({self.values})'

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Context in which device='cuda' is the pretended GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_real(tensor) -> bool:
    """Whether a tensor is in the runtime's memory: torch.tensor(..., device='cuda') makes it where no mode looks."""
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, Pretended) and tensor.is_cuda


def adopted(tensor):
    """Such a tensor as a pretended one."""
    import ctypes
    if not is_real(tensor):
        return tensor
    seen.wait('copy of a list')
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    ctypes.memmove(made.data_ptr(), tensor.data_ptr(), made.numel() * made.element_size())
    return Pretended(made)


def kind_of(device) -> str | None:
    return None if device is None else torch.device(device).type


def run(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return DEVICE
    args, kwargs = tree_map_only(torch.Tensor, adopted, (args, dict(kwargs)))
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    wanted = kind_of(kwargs.get('device'))
    if not ours and wanted != 'cuda':
        return func(*args, **kwargs)
    if func is aten.record_stream.default:
        ours[0].stream = None
        return None
    notice(func, args, tensors, ours)
    if func in COPYING:
        copied = copy(func, args, kwargs, wanted)
        if copied is not None:
            return copied
    if wanted == 'cuda':
        kwargs['device'] = 'cpu'
    if kwargs.get('pin_memory'):
        del kwargs['pin_memory']
    values = tree_map_only(Pretended, lambda tensor: tensor.values, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        made = func(*values[0], **values[1])
    if func in VALUES or made is None or wanted == 'cpu':
        return made
    schema = func._schema
    if schema.name.endswith('_') and len(schema.returns) == 1:  # in place
        return args[0]
    made = tree_map_only(torch.Tensor, Pretended, made)
    if any(result.alias_info is not None for result in schema.returns):
        made = return_and_correct_aliasing(func, args, kwargs, made)
    return made


def notice(func, args, tensors, ours) -> None:
    """Notices what a GPU would do otherwise, and raises where it would."""
    stream = torch.cuda.current_stream().cuda_stream
    if any(tensor.stream not in (None, stream) for tensor in ours):
        seen.strays[where()] += 1
    if ours and func not in COPYING:
        others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
        if others and func in INDEXING and isinstance(args[0], Pretended):
            seen.wait('copy of indices')
        elif others:
            raise RuntimeError('Expected all tensors to be on the same device, but found at least two devices, '
                               f'{DEVICE} and cpu! ({func} at {where()})')
    if func in WAITING:
        seen.wait(func._schema.name.removeprefix('aten::'))
        arrive()
    if func in INDEXING:
        masks = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if masks and (func is aten.index.Tensor or args[2].numel() > 1):
            seen.wait('mask')


def copy(func, args, kwargs, wanted):
    """Copies between host and device; None of what is none."""
    in_place = func is aten.copy_.default
    source, target = (args[1], args[0]) if in_place else (args[0], None)
    to_gpu = isinstance(target, Pretended) if in_place else wanted == 'cuda'
    from_gpu = isinstance(source, Pretended)
    unawaited = args[2] if in_place and len(args) > 2 else kwargs.get('non_blocking', False)
    if to_gpu and not from_gpu:
        if unawaited and source.is_pinned():
            send(source, source, to_host=False)
        elif source.dim() or not in_place:  # a single number goes along with the kernel
            seen.wait('copy to the GPU')
    to_host = from_gpu and (not to_gpu if in_place else wanted == 'cpu')
    if not to_host:
        return None
    if not in_place:
        target = torch.empty_strided(
            source.size(), source.stride(), dtype=kwargs.get('dtype') or source.dtype, pin_memory=unawaited)
    if unawaited and target.is_pinned():
        send(target, source.values.to(target.dtype), to_host=True)
    else:
        seen.wait('copy to the host')
        arrive()
        target.copy_(source.values)
    return target


@contextmanager
def limited(extra: int):
    """Context in which there is no more memory than is taken now, and so many bytes."""
    seen.limit = seen.bytes + extra
    try:
        yield
    finally:
        seen.limit = float('inf')


class NoGrad(torch.no_grad):
    """In the place of torch.inference_mode, in which a pretended tensor cannot have views."""

    def __init__(self, mode=True):
        super().__init__()


if 'libcuda.so.1' in os.environ.get('LD_PRELOAD', ''):  # else this is only looked at, for doctests
    torch.inference_mode = NoGrad
    torch.cuda.Event, torch.cuda.synchronize = Event, synchronize
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` would leave `values` behind
