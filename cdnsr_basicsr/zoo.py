"""Checkpoints by name: the models that this package ships, and those in BasicSR's folder for them."""
from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional, Union

from .options import OptionError

SHIPPED = Path(__file__).with_name('pretrained_models')  # models.json and the checkpoints that it describes
PRETRAINED = Path('experiments', 'pretrained_models')  # BasicSR's folder, below the one that a command is started in
BEST = 'cdnsr-modern-x4'  # of the shipped models; what is taken where none is named
SUFFIXES = ('', '.pth', '.safetensors')  # of a name in that folder
# that there are figures for, of each model or of some; the LR images of 'degraded' are made by scripts/degrade.py
IMAGES = ('Set5', 'Set14', 'photographs', 'CID22', 'degraded')
MOST_BYTES = 5_000_000  # of a shipped file


@dataclass(frozen=True)
class ShippedModel:
    """What models.json says of a checkpoint.

    Attributes:
        name: By which commands and option files find it.
        file: Its file, beside models.json.
        sha256: Of the file, in hexadecimal digits.
        scale: Upsampling factor.
        licence: Of the weights.
        trained_on: The data, and what else there is to say of them.
        use: What to take it for, and what not; one line.
        psnr: In dB, Y channel, mean over the images, `scale` pixels of border left out; by IMAGES, without those that
            it was trained on.
        psnr_rgb: The same, of all three channels.
        ms_per_megapixel: Milliseconds per megapixel of the result.
        measured_on: The machine of that time.
        budget: That PSNR and time are for. Default: without.
        teacher: `name` and `licence` of the network whose images it was trained on, besides true ones. Default: none.
    """
    name: str
    file: str
    sha256: str
    scale: float
    licence: str
    trained_on: str
    use: str
    psnr: dict[str, float]
    psnr_rgb: dict[str, float]
    ms_per_megapixel: float
    measured_on: str
    budget: Optional[float] = None
    teacher: Optional[dict[str, str]] = None

    @property
    def path(self) -> Path:
        return SHIPPED / self.file


def shipped_models() -> dict[str, ShippedModel]:
    """The models of this package by name; there may be none."""
    index = json.loads((SHIPPED / 'models.json').read_text(encoding='utf-8'))
    return {name: ShippedModel(name, **entry) for name, entry in index.items()}


def find_checkpoint(name_or_path: Union[str, os.PathLike]) -> str:
    """The file that is meant: one of this path, else one of this name in BasicSR's folder, else in this package.

    Args:
        name_or_path: What has a folder or a suffix is a path.

    Raises:
        OptionError: There is none, or the file of this package is not the one that was shipped.
    """
    given = os.fspath(name_or_path)
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        return path
    if not path or os.path.dirname(path) or os.path.splitext(path)[1]:
        if os.path.exists(path):
            kind = 'is a folder' if os.path.isdir(path) else 'is no file that could be read'
            raise OptionError(given, f'{kind}; expected a checkpoint')
        raise OptionError(given, 'no such checkpoint file')
    for suffix in SUFFIXES:
        if (PRETRAINED / f'{path}{suffix}').is_file():
            return str(PRETRAINED / f'{path}{suffix}')
    shipped = shipped_models()
    if path in shipped:
        return checked(shipped[path])
    local = {file.stem for suffix in SUFFIXES[1:] for file in PRETRAINED.glob(f'*{suffix}')}
    raise OptionError(given, f'no such checkpoint file, and no model of this name; {known(path, local | set(shipped))}')


def checked(model: ShippedModel) -> str:
    """The file of a shipped model, if it still is what was shipped."""
    try:
        data = model.path.read_bytes()
    except OSError as error:
        raise OptionError(str(model.path), f'cannot be read: {error.strerror}; install the package again') from error
    if hashlib.sha256(data).hexdigest() != model.sha256:
        raise OptionError(
            str(model.path), 'is not the file that was shipped (its sha256 is not that of models.json); '
            'install the package again')
    return str(model.path)


def is_shipped(path: str) -> bool:
    """Whether a file is one of this package's."""
    return Path(path).resolve().parent == SHIPPED.resolve()


def known(name: str, names: set[str]) -> str:
    """The names there are, and which of them may be meant."""
    if not names:
        return 'this build ships none'
    nearest = difflib.get_close_matches(name, names, n=1)
    meant = f'did you mean {nearest[0]}? ' if nearest else ''
    return f'{meant}known: {", ".join(sorted(names))}'


def best_first(models: Iterable[ShippedModel]) -> list[ShippedModel]:
    """The models by scale, largest first, and those of one scale by quality: PSNR of the photographs, best first."""
    return sorted(models, key=lambda model: (-model.scale, -model.psnr.get('photographs', 0), model.ms_per_megapixel))


def describe(models: Iterable[ShippedModel]) -> str:
    """The shipped models as a table to read, in their order, and below it what is too long for one."""
    models = list(models)
    if not models:
        return 'This build ships no models.\n'
    measured = [images for images in IMAGES if any(images in model.psnr for model in models)]
    rows = [['model', 'scale', 'MB', *measured, 'ms/megapixel', 'licence']]
    for model in models:
        psnr = [f'{model.psnr[images]:.2f}' if images in model.psnr else '-' for images in measured]
        rows.append([
            model.name, f'x{model.scale:g}', f'{model.path.stat().st_size / 1e6:.2f}', *psnr,
            f'{model.ms_per_megapixel:.1f}', model.licence
        ])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    uses = [f'{model.name}: {model.use}' for model in models]
    notes = ['PSNR in dB, Y channel, as many pixels of border left out as the scale; best first.']
    facts = {
        'with budget': [f'{model.budget:g}' if model.budget else '' for model in models],
        'measured on': [model.measured_on for model in models],
        'trained on': [model.trained_on for model in models],
        'taught by':
        [f'{model.teacher["name"]} ({model.teacher["licence"]})' if model.teacher else '' for model in models]
    }
    for what, texts in facts.items():
        for text in filter(None, dict.fromkeys(texts)):
            names = ', '.join(model.name for model, its in zip(models, texts) if its == text)
            notes.append(f'{names}: {what} {text}.')
    width = max(40, shutil.get_terminal_size().columns)
    filled = [[textwrap.fill(text, width, subsequent_indent='  ', break_on_hyphens=False) for text in texts]
              for texts in (uses, notes)]
    return '\n'.join([*lines, '', *filled[0], '', *filled[1]]) + '\n'
