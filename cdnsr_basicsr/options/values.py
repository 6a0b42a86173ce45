"""What refuses a value of an option file, with one clear line."""
from __future__ import annotations

import os
from typing import Any, Iterable, Mapping, Optional

MAX_NUMBER = 2**16
MAX_NAME = 150  # bytes; BasicSR puts more around it


class OptionError(ValueError):
    """A mistake in an option file, on the command line or in an argument.

    Attributes:
        key: Where: the option's path (``train.freeze``), a file, a command line flag, or an argument (``scale=0``).
        message: What is wrong and what is accepted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f'{key}: {message}')
        self.key, self.message = key, message


def one_line(error: BaseException) -> str:
    """What an error says, short and without line breaks."""
    return ' '.join(str(error).split())[:300]


def shown(value: Any) -> str:
    """A value as messages show it, in a line of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:100]} ...'


def check_keys(block: Any, accepted: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    """Refuses unknown and missing keys of one option block.

    Raises:
        OptionError: With the place, the key and what is accepted.
    """
    if not isinstance(block, Mapping):
        raise OptionError(where, f'expected a block of options, but got {shown(block)}')
    accepted = list(accepted)
    for key in block:
        if key not in accepted:
            raise OptionError(f'{where}.{key}', f'unknown key; accepted: {", ".join(sorted(accepted))}')
    for key in required:
        if key not in block:
            raise OptionError(where, f'key {key!r} is missing')


def check_number(value: Any, where: str, low: float, high: Optional[float] = None, integer: bool = False) -> None:
    """Refuses a value that is no finite number (an integer, if asked for) in [low, high]."""
    kinds = (int, ) if integer else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and low <= value < float('inf')
    if not fits or value == float('-inf') or (high is not None and value > high):
        span = f' at least {low}' if low > float('-inf') else ''
        span = span if high is None else f' from {low} to {high}'
        raise OptionError(where, f'expected {"an integer" if integer else "a number"}{span}, but got {shown(value)}')


def check_whole(value: Any, where: str, low: int, high: int) -> None:
    """Refuses a value that is no whole number in [low, high]; 5e3 is one."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or value != int(value):
        raise OptionError(where, f'expected a whole number from {low} to {high}, but got {shown(value)}')


def check_list(value: Any, where: str, *lengths: int) -> None:
    """Refuses a value that is no list, or an empty one, or, if asked for, one of other lengths."""
    if not isinstance(value, (list, tuple)) or len(value) not in (lengths or range(1, MAX_NUMBER)):
        count = f' of {" or ".join(map(str, lengths))} values' if lengths else ''
        raise OptionError(where, f'expected a list{count}, but got {shown(value)}')


def check_name(value: Any, where: str) -> None:
    """Refuses a value that could not name a folder of its own."""
    fits = isinstance(value, str) and 0 < len(os.fsencode(value)) <= MAX_NAME and value.isprintable()
    if not fits or value != value.strip() or set(value) & set('/\\') or value in ('.', '..'):
        raise OptionError(where, f'expected the name of a folder, but got {shown(value)}')


def check_choice(value: Any, where: str, accepted: Iterable[Any]) -> None:
    """Refuses a value that is none of those accepted."""
    accepted = list(accepted)
    if value not in accepted:
        raise OptionError(where, f'accepted: {", ".join(str(item) for item in accepted)}; got {shown(value)}')


def check_flag(value: Any, where: str) -> None:
    """Refuses a value that is neither true nor false; 'no', 0 and 1 are none of them."""
    if not isinstance(value, bool):
        raise OptionError(where, f'accepted: true, false; got {shown(value)}')


def check_word(value: Any, where: str, expected: str = 'a word') -> None:
    """Refuses a value that is no text."""
    if not isinstance(value, str):
        raise OptionError(where, f'expected {expected}, but got {shown(value)}')


def check_path(value: Any, where: str) -> None:
    """Refuses a path that does not exist."""
    check_word(value, where, 'a path')
    if not os.path.exists(os.path.expanduser(value)):
        raise OptionError(where, f'no such file or folder: {value}')
