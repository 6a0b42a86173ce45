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
BEST = 'cdnsr-etds-x4'  # of the shipped models; what is taken where none is named
SUFFIXES = ('', '.pth', '.safetensors')  # of a name in that folder
IMAGES = ('Set5', 'Set14', 'photographs')  # that there are figures for


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
        psnr: In dB, Y channel, `scale` pixels of border left out; by IMAGES.
        ms_per_megapixel: Milliseconds per megapixel of the result.
        measured_on: The machine of that time.
        budget: That PSNR and time are for. Default: without.
    """
    name: str
    file: str
    sha256: str
    scale: float
    licence: str
    trained_on: str
    psnr: dict[str, float]
    ms_per_megapixel: float
    measured_on: str
    budget: Optional[float] = None

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


def describe(models: Iterable[ShippedModel]) -> str:
    """The shipped models as a table to read, and below it what is too long for one."""
    models = list(models)
    if not models:
        return 'This build ships no models.\n'
    rows = [['model', 'scale', 'MB', 'licence', *IMAGES, 'ms/megapixel', 'budget']]
    for model in models:
        psnr = [f'{model.psnr[images]:.2f}' if images in model.psnr else '-' for images in IMAGES]
        budget = '-' if model.budget is None else f'{model.budget:g}'
        rows.append([
            model.name, f'x{model.scale:g}', f'{model.path.stat().st_size / 1e6:.2f}', model.licence, *psnr,
            f'{model.ms_per_megapixel:.1f}', budget
        ])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    notes = ['PSNR in dB, Y channel, as many pixels of border left out as the scale.']
    for what, key in (('measured on', 'measured_on'), ('trained on', 'trained_on')):
        for text in dict.fromkeys(getattr(model, key) for model in models):
            names = ', '.join(model.name for model in models if getattr(model, key) == text)
            notes.append(f'{names}: {what} {text}.')
    width = max(40, shutil.get_terminal_size().columns)
    return '\n'.join([*lines, '', *(textwrap.fill(note, width, subsequent_indent='  ') for note in notes)]) + '\n'
