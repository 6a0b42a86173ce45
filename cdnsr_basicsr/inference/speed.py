"""How fast the parts of a network run on this machine, measured once and remembered."""
from __future__ import annotations

import hashlib
import json
import torch
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

from ..complexity import LONG, measure_latency
from ..files import replace_when_done
from ..machine import cpu_model, speed_file

MAX_TILES = {'cpu': (1, 2, 4, 8), 'cuda': (1, 4, 16, 64, 256)}  # per forward pass, that are tried; bounds the memory
# torch's own error aside: of the CUDA driver, of the CPU, of cuDNN and cuBLAS, and where cuDNN has no memory to work in
SHORTAGES = ('out of memory', "can't allocate memory", 'ALLOC_FAILED', 'ALLOCATION_FAILED', 'unable to find an engine')


class Speed(NamedTuple):
    """Measured speed of the parts of a network: its branches, then its classifier if it has one.

    Attributes:
        max_tiles: Tiles per forward pass at which each part is fastest.
        tile_ms: Time of one tile then, in milliseconds.
    """
    max_tiles: list[int]
    tile_ms: list[float]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, by its type or its words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORTAGES)


def kind_of(device: torch.device) -> str:
    """'cuda' or 'cpu': of device, for what was chosen by it."""
    return 'cuda' if device.type == 'cuda' else 'cpu'


def machine(device: torch.device) -> str:
    """What a measurement depends on beside the network."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{cpu_model()}, {torch.get_num_threads()} threads'
    return f'{name}, torch {torch.__version__}'


def measured_speed(parts: Sequence[Callable[[torch.Tensor], Any]],
                   names: Sequence[str],
                   patch_size: int,
                   channels: int,
                   device: torch.device,
                   fresh: bool = False,
                   most: Optional[Sequence[int]] = None) -> Speed:
    """Measures parts of a network, or takes what was measured before from the user's cache folder.

    Args:
        parts: Functions of a batch of tiles (b, channels, patch_size, patch_size).
        names: A description of each: parts of the same description are taken to be equally fast.
        patch_size: Side of a tile in pixels.
        channels: Channels of a tile.
        device: Where the tiles are.
        fresh: Whether to measure again what is known.
        most: Tiles per forward pass of each part that there is memory for. Default: as many as are tried.
    """
    path = speed_file()
    measured = []
    for i, (part, name) in enumerate(zip(parts, names)):
        text = f'{machine(device)}\n{channels}x{patch_size}\n{name}'
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        entry = None if fresh else read_json(path).get(key)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(value, (int, float))
                                                                    for value in entry)):
            counts = MAX_TILES[kind_of(device)]
            tried = [count for count in counts if most is None or count <= most[i]]
            entry, steady = measure_part(part, patch_size, channels, device, tried)
            torch.cuda.empty_cache()  # of the largest batches, also of one that was too large
            if steady and len(tried) == len(counts):  # else the next process may find a quieter minute
                remember(path, key, entry)
        measured.append(entry)
    return Speed([int(count) for count, _ in measured], [float(ms) for _, ms in measured])


def remember(path: Path, key: str, entry: list[float]) -> None:
    """Adds an entry to the cache, which other processes may have changed in the meantime."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_done(path) as temporary:
            temporary.write_text(json.dumps(dict(read_json(path), **{key: entry}), indent=1), encoding='utf-8')
    except OSError:
        pass  # a cache that cannot be written is measured again


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def measure_part(part: Callable[[torch.Tensor], Any], patch_size: int, channels: int, device: torch.device,
                 counts: Sequence[int]) -> tuple[list[float], bool]:
    """Tiles per forward pass, of those to be tried, at which a part is fastest, and its milliseconds per tile then.

    Returns:
        Both, and whether all times can be relied on.
    """
    best_count, best_ms, all_steady = 1, float('inf'), True
    for count in counts:
        try:
            tiles = torch.rand(count, channels, patch_size, patch_size, device=device)
            seconds, steady = measure_latency(part, tiles.to(memory_format=torch.channels_last))
        except RuntimeError as error:
            if count == 1 or not is_out_of_memory(error):
                raise
            break
        all_steady = all_steady and steady
        if 1000 * seconds / count < 0.97 * best_ms:
            best_count, best_ms = count, 1000 * seconds / count
        elif count > 2 * best_count:
            break
        if seconds > LONG:
            break
    return [best_count, best_ms], all_steady
