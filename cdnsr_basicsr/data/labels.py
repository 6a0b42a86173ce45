"""The file of difficulty labels beside a patch LMDB: one line `key label score [error ...]` per patch."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Union

from ..files import replace_when_done
from ..options import OptionError


class Label(NamedTuple):
    """Class of a patch (0 = easiest), its score, and the errors of the branches, if known.

    `errors` are mean squared errors in grey levels (0 to 255).
    """
    label: int
    score: float
    errors: tuple[float, ...] = ()


def read_labels(path: Union[str, Path]) -> dict[str, Label]:
    """Reads a label file.

    Returns:
        Label per patch key.

    Raises:
        OptionError: The file is missing or a line is not `key label score`, with as many errors behind as the others.
    """
    labels = {}
    try:
        lines = Path(path).read_text(encoding='ascii').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(str(path), f'label file cannot be read: {error}') from None
    for number, line in enumerate(lines, 1):
        try:
            key, label, score, *errors = line.split()
            labels[key] = Label(int(label), float(score), tuple(float(error) for error in errors))
        except ValueError:
            raise OptionError(f'{path}, line {number}', f"expected 'key label score', but got {line!r}") from None
        if number == 1:
            num_errors = len(errors)
        if len(errors) != num_errors:
            raise OptionError(f'{path}, line {number}', f'has {len(errors)} errors, earlier lines {num_errors}')
        if labels[key].label < 0:
            raise OptionError(f'{path}, line {number}', f'expected a label of at least 0, but got {label}')
    return labels


def write_labels(path: Union[str, Path], labels: dict[str, Label]) -> None:
    """Writes a label file, sorted by key, complete or not at all."""
    rows = ([key, str(entry.label), *(f'{value:.6f}' for value in (entry.score, *entry.errors))]
            for key, entry in sorted(labels.items()))
    with replace_when_done(path) as temporary:
        temporary.write_text(''.join(' '.join(row) + '\n' for row in rows), encoding='ascii')
