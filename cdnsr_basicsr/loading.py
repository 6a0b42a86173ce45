"""From settings to an upscaler: finds the network, puts it on its device, takes its calibration, routes."""
from __future__ import annotations

import cv2
import os
import torch
from dataclasses import replace
from torch import nn
from typing import Optional

from .calibration import read_calibration, speed_of
from .conversion.convert import load_network
from .export import check_backend, in_backend, is_exported, load_exported, needs
from .inference import TileUpscaler, Upscaler, default_patch_size, make_upscaler
from .inference.network import pixel_routed, route
from .inference.runtime import installed
from .memory import GpuMemory, HostMemory, Memory, MemoryLimit, ShortOfMemory, keep_freed_memory
from .options import OptionError, check_keys, check_number, one_line, read_options, read_routing
from .options.schema import Routing, filled
from .settings import AUTO, LIMITS, Settings, bytes_of


def choose_device(name: Optional[str]) -> torch.device:
    """The device of a name. Default: the process's GPU if there is one, of those that it sees, otherwise the CPU.

    Raises:
        OptionError: There is no such device.
    """
    if name in (None, 'cuda'):
        number = int(os.environ.get('LOCAL_RANK') or 0) % max(1, torch.cuda.device_count())
        name = f'cuda:{number}' if name or torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == 'cuda':
            torch.cuda.set_device(device)  # events, synchronisation and statistics go by it
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise OptionError(f'device={name}', f'cannot be used: {str(error).splitlines()[0]}') from error
    return device


def choose_backend(settings: Settings) -> str:
    """What is to run the network; refused if it cannot."""
    backend, exported = settings.backend or 'torch', is_exported(settings.model)
    if exported:
        if settings.backend == 'torch':
            raise OptionError('backend=torch', f'{settings.model} is an exported network; give the checkpoint instead')
        if not settings.backend and not installed():
            raise needs(None)
        backend = settings.backend or installed()[0]
    check_backend(backend, settings.precision)
    if backend != 'torch' and settings.device not in (None, 'cpu'):
        raise OptionError(f'device={settings.device}', f'{backend} runs on the CPU; backend=torch runs on others')
    if backend != 'torch' and settings.memory is not None:
        raise OptionError(f'memory={settings.memory}', f'the memory of {backend} cannot be limited; use backend=torch')
    return backend


def use_threads(count: int) -> None:
    """Sets the number of threads that this process computes with."""
    torch.set_num_threads(count)
    cv2.setNumThreads(count)


def memory_limit_of(memory: str, device: torch.device) -> MemoryLimit:
    """The limit that `memory` of Settings sets.

    Raises:
        OptionError: Memory cannot be limited on this system.
    """
    try:
        limited: Memory = HostMemory() if device.type == 'cpu' else GpuMemory(device.index)
    except OSError as error:
        raise OptionError(f'memory={memory}', str(error)) from error
    return MemoryLimit(limited, None if memory == AUTO else bytes_of(memory))


def load_on_device(settings: Settings) -> nn.Module:
    """The network that the settings name, on the device that they name."""
    from . import load_plugins
    load_plugins()
    device = choose_device(settings.device)
    net = load_network(settings.model, settings.opt).to(device)
    if device.type == 'cpu':
        keep_freed_memory()
    return net


def tile_of(settings: Settings, default: int) -> tuple[int, Optional[int]]:
    """Patch size and step: the settings', else the option file's, else the default and None.

    Args:
        settings: The settings.
        default: Patch size where nothing says otherwise.

    Raises:
        OptionError: They cannot be.
    """
    tile = (read_options(settings.opt).get('tile') or {}) if settings.opt else {}
    check_keys(tile, ('patch_size', 'step'), f'{settings.opt}: tile')
    for key, value in tile.items():
        if value is not None:
            check_number(value, f'{settings.opt}: tile.{key}', 1, integer=True)
    patch_size = settings.patch_size or tile.get('patch_size') or default
    step = settings.step or (tile.get('step') if settings.patch_size is None else None)
    check_tile(patch_size, step, None if settings.step else f'{settings.opt}: tile.step')
    return patch_size, step


def check_tile(patch_size: int, step: Optional[int], where: Optional[str] = None) -> None:
    """Refuses tiles that are too small, or that leave gaps; `where` is the step's place, if it is no setting."""
    if patch_size < 8:
        raise OptionError(f'patch_size={patch_size}', 'expected at least 8')
    if not 1 <= (step or 1) <= patch_size:
        raise OptionError(where or f'step={step}',
                          f'expected at most the patch size, {patch_size}' + f', but got {step}' * bool(where))


def route_by(opt: str, net: nn.Module) -> Optional[float]:
    """Routes pixels as an option file says, if the network does that, and returns the budget that it says."""
    routing = read_routing(opt) if pixel_routed(net) is not None else {}
    if routing:
        route(net, filled(Routing, routing))
    return routing.get('budget')


def upscaler_for(settings: Settings) -> Upscaler:
    """The upscaler that settings describe; see `load`."""
    backend, exported = choose_backend(settings), is_exported(settings.model)
    if settings.threads is not None:
        use_threads(settings.threads)
    if exported:
        keep_freed_memory()
        model, net = str(settings.model), load_exported(str(settings.model), backend)
    else:
        if backend != 'torch':
            settings = replace(settings, device='cpu')
        net = load_on_device(settings)
        model = settings.model or str(read_options(str(settings.opt))['path']['pretrain_network_g'])
    patch_size, step = tile_of(settings, default_patch_size(net))
    calibration = None if exported else read_calibration(model, net, settings.precision, patch_size)
    budget = route_by(settings.opt, net) if settings.opt else None
    limits = {name: getattr(settings, name) for name in LIMITS}
    if any(limit is not None for limit in limits.values()):
        budget = settings.budget
    if backend != 'torch' and not exported:
        net = in_backend(net, backend, model)
    try:
        upscaler = make_upscaler(
            net,
            patch_size,
            step,
            budget=budget,
            target_ms=settings.target_ms,
            max_loss=settings.max_loss,
            fidelity=settings.fidelity,
            cost=settings.cost,
            scale=settings.scale,
            precision=settings.precision,
            float32_branches=calibration.float32_branches if calibration else ())
    except (ValueError, RuntimeError) as error:
        raise OptionError(model, one_line(error)) from error
    for name, limit in limits.items():
        if limit is not None and not upscaler.routed:
            raise OptionError(f'{name}={limit:g}', 'needs a network that routes, CDNSR or PCSR')
    if calibration and backend == 'torch' and isinstance(upscaler, TileUpscaler):
        upscaler.measured = speed_of(calibration, upscaler)
        upscaler.take_hardest(calibration.hardest)
    if settings.memory is not None:
        memory_limit = memory_limit_of(settings.memory, upscaler.device)
        try:
            upscaler.limit_memory(memory_limit)
        except ShortOfMemory as error:
            raise OptionError(f'memory={settings.memory}', f'{model} {error}') from error
    return upscaler


def load(model: Optional[str | os.PathLike[str]] = None,
         *,
         opt: Optional[str] = Settings.opt,
         backend: Optional[str] = Settings.backend,
         budget: Optional[float] = Settings.budget,
         target_ms: Optional[float] = Settings.target_ms,
         max_loss: Optional[float] = Settings.max_loss,
         fidelity: Optional[float] = Settings.fidelity,
         cost: Optional[str] = Settings.cost,
         scale: Optional[float] = Settings.scale,
         precision: str = Settings.precision,
         patch_size: Optional[int] = Settings.patch_size,
         step: Optional[int] = Settings.step,
         device: Optional[str] = Settings.device,
         memory: Optional[str] = Settings.memory,
         threads: Optional[int] = Settings.threads) -> Upscaler:
    """Loads a network and all that upscaling needs: the settings of `basicsr upscale`, by the same names.

    On a CPU the process keeps freed memory from then on, which makes it faster.

    Args:
        model: Checkpoint, name of a shipped model, or folder of an exported network.
        opt, backend, budget, target_ms, max_loss, fidelity, cost, scale, precision, patch_size, step, device, memory,
            threads: See Settings.

    Returns:
        What upscales images, `upscale`, and folders of them, `upscale_folder`.

    Raises:
        OptionError: Something does not fit or cannot be found; `key` and `message` say what.
    """
    return upscaler_for(
        Settings(None if model is None else os.fspath(model), opt, backend, budget, target_ms, max_loss, fidelity, cost,
                 scale, precision, patch_size, step, device, memory, threads))
