"""Checkpoints by name: the models that this package ships, and those in BasicSR's folder of pretrained models."""
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
BEST = 'cdnsr-modern-x4'  # of the shipped models; the default where none is named
SUFFIXES = ('', '.pth', '.safetensors')  # of a name in that folder
# sets with figures for all models, or for some; scripts/degrade.py makes the LR images of 'degraded'
IMAGES = ('Set5', 'Set14', 'photographs', 'CID22', 'degraded')
MOST_BYTES = 5_000_000  # of a shipped file


@dataclass(frozen=True)
class ShippedModel:
    """What models.json says about a checkpoint.

    Attributes:
        name: Its name in commands and option files.
        file: Its file, beside models.json.
        sha256: Of the file, in hexadecimal digits.
        scale: Upsampling factor.
        licence: Of the weights.
        trained_on: The data, and remarks on them.
        use: What it is for, and what not; one line.
        psnr: In dB, Y channel, mean over the images without a border of `scale` pixels; by IMAGES, except those that
            it was trained on.
        psnr_rgb: The same, of all three channels.
        ms_per_megapixel: Milliseconds per megapixel of the result.
        measured_on: The machine on which that time was measured.
        budget: Budget at which PSNR and time were measured. Default: none.
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
    """The models of this package by name; possibly none."""
    index = json.loads((SHIPPED / 'models.json').read_text(encoding='utf-8'))
    return {name: ShippedModel(name, **entry) for name, entry in index.items()}


def find_checkpoint(name_or_path: Union[str, os.PathLike]) -> str:
    """Finds a checkpoint: at this path, else by this name in BasicSR's folder, else in this package.

    Args:
        name_or_path: A path if it has a folder or a suffix, otherwise a name.

    Raises:
        OptionError: There is none, or this package's file has changed since it was shipped.
    """
    given = os.fspath(name_or_path)
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        return path
    if not path or os.path.dirname(path) or os.path.splitext(path)[1]:
        if os.path.exists(path):
            kind = 'is a folder' if os.path.isdir(path) else 'is not a file that can be read'
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
    """Returns the file of a shipped model; raises OptionError if it has changed since it was shipped."""
    try:
        data = model.path.read_bytes()
    except OSError as error:
        raise OptionError(str(model.path), f'cannot be read: {error.strerror}; install the package again') from error
    if hashlib.sha256(data).hexdigest() != model.sha256:
        raise OptionError(
            str(model.path), 'has changed since it was shipped (its SHA-256 is not the one in models.json); '
            'install the package again')
    return str(model.path)


def is_shipped(path: str) -> bool:
    """Whether a file is one of this package's."""
    return Path(path).resolve().parent == SHIPPED.resolve()


def known(name: str, names: set[str]) -> str:
    """The known names, and which of them may be meant."""
    if not names:
        return 'this build ships none'
    nearest = difflib.get_close_matches(name, names, n=1)
    meant = f'did you mean {nearest[0]}? ' if nearest else ''
    return f'{meant}known: {", ".join(sorted(names))}'


def best_first(models: Iterable[ShippedModel]) -> list[ShippedModel]:
    """The models by scale, largest first, and those of one scale by quality: PSNR of the photographs, best first."""
    return sorted(models, key=lambda model: (-model.scale, -model.psnr.get('photographs', 0), model.ms_per_megapixel))


def describe(models: Iterable[ShippedModel]) -> str:
    """The shipped models as a table for people, in the given order; longer texts follow below it."""
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
    notes = ['PSNR in dB of the Y channel, without a border as wide as the scale; best first.']
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
