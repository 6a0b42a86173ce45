"""Networks as ONNX files in a folder, for runtimes other than torch: what `basicsr export` does."""
from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import re
import tempfile
import torch
import warnings
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from typing import Any, Optional, Sequence, Union

from .files import replace_folder_when_done
from .inference import TileUpscaler
from .inference.network import arch_of, deployed, parts_of, pixel_routed, predicts_errors
from .inference.runtime import BACKENDS, ExportedErrorPredictor, ExportedNetwork, ExportedPart, installed, precisions
from .options import OptionError, check_choice, check_keys, check_number, one_line

FORMAT = 2  # of the folder; another number when its readers would misunderstand it
DESCRIPTION = 'export.json'
MOST_BYTES = 2**24  # of the description
FILE_NAME = re.compile(r'classifier\.onnx|branch_\d\.onnx|export\.json')
OPSET = 17
TILE = 64  # side of the tile that multiply-accumulates are counted for
RULE = (
    'The class of a tile is argmax_i (log_softmax(logits)_i - price * costs_i). Without a budget the price is 0; a '
    'budget takes the lowest price whose cost is within it. Classifier and branches take RGB or gray of shape '
    '(b, channels, h, w) in [0, 1], h and w multiples of `multiple`; branch i upscales the tiles of class i. Gray is '
    'luma in studio range, (16 + 65.481 R + 128.553 G + 24.966 B) / 255, which the results are, too.')
ERRORS = (
    'The classifier predicts squared errors, in grey levels of 255: -price * (logits + costs). Under a budget, minus '
    'these are the logits of the rule.')
CHECKED = ((1, 16, 16), (3, 17, 23), (2, 61, 40), (1, 64, 119))  # batch, height, width of what is compared with torch
TOLERANCE = 0.1 / 255  # of the difference, a tenth of a grey level; relative to the largest value where that is above 1


def needs(backend: Optional[str]) -> OptionError:
    """The message for a missing package."""
    extras = [BACKENDS[backend]] if backend else sorted(BACKENDS.values())
    commands = ' or '.join(f"pip install 'cdnsr-basicsr[{extra}]'" for extra in extras)
    return OptionError(f'backend={backend}' if backend else 'onnx, onnxruntime or openvino',
                       f'not installed; {commands}')


def check_backend(backend: str, precision: str = 'float32') -> None:
    """Refuses a backend that is not installed, or has no such precision."""
    if backend != 'torch' and backend not in installed():
        raise needs(backend)
    accepted = precisions(backend)
    if precision not in accepted:
        raise OptionError(f'backend={backend}', f'computes in {" or ".join(accepted)} here, not in {precision}')


def export(net: nn.Module,
           model: str,
           out: Path,
           about: Optional[dict] = None,
           backends: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Writes a network as ONNX files and a description, after comparing their outputs with torch's.

    Args:
        net: A CDNSR network, or any super-resolution network, on the CPU, in evaluation mode.
        model: Its checkpoint, for messages.
        out: Folder to write; appears when all is done, and replaces one that is there.
        about: What the description is to say of the network besides.
        backends: What to compare with torch. Default: what is installed.

    Returns:
        For each backend the largest difference between the branches' images and torch's, in grey levels.

    Raises:
        OptionError: Packages are missing, or a part cannot be exported or comes out otherwise than in torch.
    """
    backends = installed() if backends is None else backends
    if not backends or not importlib.util.find_spec('onnx'):
        raise needs(None)
    if pixel_routed(net) is not None:
        raise OptionError(model, 'routes pixels; only networks without routing or with branches can be exported')
    try:
        upscaler = TileUpscaler(net, TILE)
    except (ValueError, RuntimeError) as error:
        raise OptionError(model, one_line(error)) from error
    parts, macs = parts_of(net), [*upscaler.branch_macs, upscaler.classifier_macs]
    multiple = math.lcm(upscaler.multiple, *(getattr(part, 'export_multiple', 1) for part in parts.values()))
    with replace_folder_when_done(out) as folder:
        entries = {}
        for (name, part), number in zip(parts.items(), macs):
            data = to_onnx(part, name, upscaler.channels, multiple)
            (folder / f'{name}.onnx').write_bytes(data)
            entries[name] = dict(file=f'{name}.onnx', sha256=hashlib.sha256(data).hexdigest(), macs=int(number))
            entries[name]['arch'] = arch_of(part)
        content: dict[str, Any] = dict(format=FORMAT, scale=upscaler.scale, channels=upscaler.channels)
        content.update(multiple=multiple, tile=-(-upscaler.patch_size // multiple) * multiple)
        content['branches'] = [entries[name] for name in parts if name != 'classifier']
        if upscaler.routed:
            content['classifier'] = entries['classifier']
            predictor = predicts_errors(parts['classifier'])
            if predictor is not None:
                content['errors'] = dict(rule=ERRORS, price=predictor.price, costs=predictor.costs.tolist())
                content['errors'].update(margin=upscaler.margin, reference=upscaler.reference)
            content['routing'] = dict(rule=RULE, costs=upscaler.costs.tolist())
        content['about'] = about or {}
        content['sha256'] = digest(content)
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        return compare(net, {backend: load_exported(folder, backend) for backend in backends})


def digest(content: dict) -> str:
    """SHA-256 of a description without the digest itself."""
    said = {key: value for key, value in content.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def to_onnx(part: nn.Module, name: str, channels: int, multiple: int) -> bytes:
    """A classifier or branch as the content of an ONNX file, for images of any number and size.

    Raises:
        OptionError: It cannot be exported.
    """
    height, width = (-(-size // multiple) * multiple for size in (24, 36))  # none that is compared
    part, file = deployed(part, torch.float32), io.BytesIO()
    x = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')  # what tracing might have missed shows when the outputs are compared
        try:
            names = {0: 'batch', 2: 'height', 3: 'width'}
            output = {0: 'batch'} if part(x).dim() == 2 else {0: 'batch', 2: 'output_height', 3: 'output_width'}
            # the exporter that traces: it needs fewer packages and a tenth of the time
            torch.onnx.export(
                part, (x, ),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=['input'],
                output_names=['output'],
                dynamic_axes=dict(input=names, output=output))
        except Exception as error:  # of any type, as each layer puts it
            raise OptionError(name, f'cannot be exported: {type(error).__name__}: {one_line(error)}') from error
    return file.getvalue()


def sample_images(shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Noise, and something like photographs: noise of all scales and an edge, in [0, 1]."""
    random = torch.Generator().manual_seed(shape[2])
    noise = torch.rand(shape, generator=random)
    scales = [noise / 16, torch.linspace(0, 0.25, shape[3]).expand(shape).gt(0.1) / 4]
    for size in (2, 4, 8):
        coarse = torch.rand(*shape[:2], size, size, generator=random) / size
        scales.append(F.interpolate(coarse, size=shape[2:], mode='bilinear', align_corners=False))
    return [noise, sum(scales).clamp(0, 1)]


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    return float((output - expected).abs().max() / expected.abs().max().clamp(min=1))


@torch.no_grad()
def compare(net: nn.Module, exported: dict[str, nn.Module]) -> dict[str, float]:
    """Compares classifier and branches of an exported network, in each backend, with torch's in float64.

    Returns:
        For each backend the largest difference between the branches' images and torch's, in grey levels.

    Raises:
        OptionError: They differ by more than a tenth of a grey level and twice what torch itself loses in float32,
            which for noise, an unnatural image, can be a lot.
    """
    worst = dict.fromkeys(exported, 0.)
    for name, part in parts_of(net).items():
        others = {backend: parts_of(other)[name] for backend, other in exported.items()}
        _, channels, multiple = next(iter(others.values())).known_geometry
        precise = copy.deepcopy(part).double()
        for batch, *sides in CHECKED:
            shape = (batch, channels, *(-(-side // multiple) * multiple for side in sides))
            for x in sample_images(shape):
                exact = precise(x.double())
                limit = TOLERANCE + 2 * _difference(part(x), exact)
                for backend, other in others.items():
                    try:
                        difference = _difference(other(x), exact)
                    except RuntimeError as error:
                        raise OptionError(name, f'{backend} cannot run it on {shape}: {one_line(error)}') from error
                    if not difference <= limit:  # also of what is no number
                        raise OptionError(
                            name, f'cannot be exported: on {shape}, {backend} makes an output that differs by '
                            f'{255 * difference:.2f} grey levels from that of torch')
                    if name != 'classifier':
                        worst[backend] = max(worst[backend], 255 * difference)
    return worst


def export_to_folder(net: nn.Module, model: str, out: str, about: dict, overwrite: bool) -> dict[str, float]:
    """Exports to a folder that the user names; see `export`.

    Raises:
        OptionError: `out` holds an exported network and `overwrite` is not set, or it holds files of another kind.
    """
    folder = Path(out).resolve()
    if folder.exists():
        if not folder.is_dir():
            raise OptionError(f'-o {out}', 'is a file; expected a folder')
        names = [path.name for path in folder.iterdir()]
        strange = [name for name in names if not FILE_NAME.fullmatch(name)]
        if strange:
            raise OptionError(f'-o {out}', f'contains {strange[0]}, no part of an exported network; choose a new '
                              'folder')
        if names and not overwrite:
            raise OptionError(f'-o {out}', 'is already exported; --overwrite replaces it')
    return export(net, model, folder, about)


def in_backend(net: nn.Module, backend: str, model: str) -> nn.Module:
    """A network of torch as one that a backend runs; compared with torch before."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, model, Path(folder, 'exported'), backends=[backend])
        return load_exported(Path(folder, 'exported'), backend)


def is_exported(path: Union[str, Path, None]) -> bool:
    """Whether a path is that of a folder that `export` has written."""
    return path is not None and Path(path, DESCRIPTION).is_file()


def load_exported(folder: Union[str, Path], backend: str) -> nn.Module:
    """The network in an exported folder, run by a backend.

    Raises:
        OptionError: The folder holds none, or it has been changed since it was written.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    where = str(path)
    try:
        with path.open('rb') as file:
            content = json.loads(file.read(MOST_BYTES))
        sha256 = digest(content) if isinstance(content, dict) else ''
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(where, f'describes no exported network: {one_line(error)}') from error
    if isinstance(content, dict) and content.get('format') != FORMAT:
        raise OptionError(
            where, f'expected format {FORMAT}, but got {repr(content.get("format"))[:50]}; export the network again')
    keys = ('format', 'scale', 'channels', 'multiple', 'tile', 'branches', 'sha256')
    check_keys(content, (*keys, 'classifier', 'errors', 'routing', 'about'), where, keys)
    if content['sha256'] != sha256:
        raise OptionError(where, 'has changed since the export (its SHA-256 differs); export the network again')
    for key, most in (('scale', 64), ('multiple', 1024), ('tile', 4096)):
        check_number(content[key], f'{where}: {key}', 1, most, integer=True)
    check_choice(content['channels'], f'{where}: channels', (1, 3))
    branches, routed = content['branches'], 'classifier' in content
    if not isinstance(branches, list) or not (2 <= len(branches) <= 9 if routed else len(branches) == 1):
        raise OptionError(f'{where}: branches', 'expected a list of 2 to 9, or of one without a classifier')

    def load(block: Any, name: str, kind: type = ExportedPart, **kwargs: Any) -> ExportedPart:
        data = read_part(folder, block, name, where)
        try:
            return kind(
                data,
                backend,
                f'{name} {block["sha256"][:16]}',
                block['macs'] / content['tile']**2,
                content['channels'],
                content['scale'],
                content['multiple'],
                arch=block.get('arch'),
                **kwargs)
        except ValueError as error:
            raise OptionError(str(folder), one_line(error)) from error

    loaded = [load(block, f'branch_{i}') for i, block in enumerate(branches)]
    if not routed:
        return loaded[0]
    kwargs: dict = dict(num_classes=len(branches))
    if 'errors' in content:
        errors = content['errors']
        check_keys(errors, ('rule', 'price', 'costs', 'margin', 'reference'), f'{where}: errors', ('price', 'costs'))
        check_number(errors['price'], f'{where}: errors.price', 0)
        if not isinstance(errors['costs'], list) or len(errors['costs']) != len(branches):
            raise OptionError(f'{where}: errors.costs', 'expected one for each branch')
        for cost in errors['costs']:
            check_number(cost, f'{where}: errors.costs', 0)
        check_number(errors.get('margin', 1.), f'{where}: errors.margin', 0)
        check_choice(errors.get('reference', 'gt'), f'{where}: errors.reference', ('gt', 'hardest'))
        kwargs.update(kind=ExportedErrorPredictor, **{key: value for key, value in errors.items() if key != 'rule'})
    return ExportedNetwork(load(content['classifier'], 'classifier', **kwargs), loaded)


def read_part(folder: Path, block: Any, name: str, where: str) -> bytes:
    """Content of the ONNX file that a block of the description names."""
    check_keys(block, ('file', 'sha256', 'macs', 'arch'), f'{where}: {name}', ('file', 'sha256', 'macs'))
    check_number(block['macs'], f'{where}: {name}.macs', 0, integer=True)
    check_choice(block['file'], f'{where}: {name}.file', (f'{name}.onnx', ))
    path = folder / block['file']
    if not path.is_file():  # of a pipe nothing might ever come
        raise OptionError(str(path), 'no such file, which the exported network needs')
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(str(path), f'cannot be read: {error.strerror}') from error
    if hashlib.sha256(data).hexdigest() != block['sha256']:
        raise OptionError(str(path), f'has changed since the export (its SHA-256 is not the one in {DESCRIPTION})')
    return data
