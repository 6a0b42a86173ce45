"""The file of difficulty labels that lies beside a patch LMDB: one line `key label score` per patch."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Union

from ..files import replace_when_done
from ..options import OptionError


class Label(NamedTuple):
    """Class of a patch (0 = easiest) and the score that decided it."""
    label: int
    score: float


def read_labels(path: Union[str, Path]) -> dict[str, Label]:
    """Reads a label file.

    Returns:
        Label per patch key.

    Raises:
        OptionError: The file is missing or a line is not `key label score`.
    """
    labels = {}
    try:
        lines = Path(path).read_text(encoding='ascii').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(str(path), f'label file cannot be read: {error}') from None
    for number, line in enumerate(lines, 1):
        try:
            key, label, score = line.split()
            labels[key] = Label(int(label), float(score))
        except ValueError:
            raise OptionError(f'{path}, line {number}', f"expected 'key label score', but got {line!r}") from None
        if labels[key].label < 0:
            raise OptionError(f'{path}, line {number}', f'expected a label of at least 0, but got {label}')
    return labels


def write_labels(path: Union[str, Path], labels: dict[str, Label]) -> None:
    """Writes a label file, sorted by key, complete or not at all."""
    with replace_when_done(path) as temporary:
        temporary.write_text(
            ''.join(f'{key} {label} {score:.6f}\n' for key, (label, score) in sorted(labels.items())), encoding='ascii')
