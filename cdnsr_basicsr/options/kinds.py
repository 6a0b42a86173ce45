"""The kinds of values that keys of option files take."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional

from .values import OptionError, check_choice, check_flag, check_list, check_number, check_whole, check_word, shown

MAX_ITER = 10**8  # BasicSR's own longest trainings take 10**6
MAX_FREQ = 10**12  # never, as some write it


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        words: Its description in the reference.
        schema: Its JSON schema.
        check: Refuses anything else, given the value and its place.
        struct: The keys of the block that it takes, if they are known.
        types: The types of the loss that it takes.
        trains: The part of a network that this loss trains, if it is one alone.
    """
    words: str
    schema: Mapping[str, Any]
    check: Callable[[Any, str], None] = lambda value, where: None
    struct: Optional[type] = None
    types: tuple[str, ...] = ()
    trains: Optional[str] = None


def number(low: float = float('-inf'), high: Optional[float] = None) -> Kind:
    words, schema = _span('number', low, high)
    return Kind(words, schema, lambda value, where: check_number(value, where, low, high))


def integer(low: int, high: Optional[int] = None) -> Kind:
    words, schema = _span('integer', low, high)
    return Kind(words, schema, lambda value, where: check_number(value, where, low, high, integer=True))


def whole(low: int, high: int = MAX_ITER) -> Kind:
    """An integer that may be written as 5e3."""
    words, schema = _span('integer', low, high)
    return Kind(words, schema, lambda value, where: check_whole(value, where, low, high))


def _span(words: str, low: float, high: Optional[float]) -> tuple[str, dict[str, Any]]:
    schema: dict[str, Any] = {'type': words}
    if low > float('-inf'):
        words, schema['minimum'] = f'{words} from {low}', low
    if high is not None:
        words, schema['maximum'] = f'{words} to {high}' if high < MAX_ITER else words, high
    return words, schema


def choice(*accepted: Any) -> Kind:
    words = ', '.join('~' if value is None else f'`{value}`' for value in accepted)
    return Kind(words, {'enum': list(accepted)}, lambda value, where: check_choice(value, where, accepted))


def optional(kind: Kind) -> Kind:
    """Also `~`, the default."""
    schema = {**kind.schema, 'type': [kind.schema['type'], 'null']}
    return dataclasses.replace(
        kind, schema=schema, check=lambda value, where: None if value is None else kind.check(value, where))


def typed(words: str, *required: str) -> Kind:
    """A block of what is checked against a constructor, elsewhere."""
    return Kind(words, {'type': 'object', 'required': ['type', *required]})


def loss(*types: str, trains: Optional[str] = None) -> Kind:
    """The block of a loss, of these types (any, if none is given), or `~`."""

    def check(value: Any, where: str) -> None:
        if not value:
            return
        if types:
            check_choice(value.get('type'), f'{where}.type', types)
        check_number(value.get('loss_weight', 1), f'{where}.loss_weight', 0)
        check_number(value.get('num_negatives', 1), f'{where}.num_negatives', 1, integer=True)
        if value.get('reduction') == 'none':
            raise OptionError(f'{where}.reduction', 'none leaves no single value to minimise; accepted: mean, sum')
        check_number(value.get('target', 0), f'{where}.target', 0, 1)
        for layer, weight in (value.get('layer_weights') or {}).items():
            check_number(weight, f'{where}.layer_weights.{layer}', 0)

    named: dict[str, Any] = {'enum': list(types)} if types else {'type': 'string'}
    schema = {'type': ['object', 'null'], 'required': ['type'], 'properties': {'type': named}}
    words = 'block: ' + (', '.join(f'`{name}`' for name in types) or 'type, and arguments of the loss')
    return Kind(words, schema, check, types=types, trains=trains)


def word(words: str, schema_type: str = 'string') -> Kind:
    """A value that is checked elsewhere, or `~`."""
    return Kind(words, {'type': [schema_type, 'null']})


def text(words: str, expected: str) -> Kind:
    """A string; `expected` is what messages say of it."""
    return Kind(words, {'type': 'string'}, lambda value, where: check_word(value, where, expected))


def list_of(item: Kind, *lengths: int, words: str = 'list') -> Kind:
    """A list that is not empty; if lengths are given, of one of these."""

    def check(value: Any, where: str) -> None:
        check_list(value, where, *lengths)
        for part in value:
            item.check(part, where)

    return Kind(words, {'type': 'array'}, check)


def fitting(kind: Kind, fits: Callable[[Any], bool], expected: str) -> Kind:
    """What also fits; `expected` is what messages say of it."""

    def check(value: Any, where: str) -> None:
        kind.check(value, where)
        if not fits(value):
            raise OptionError(where, f'expected {expected}, but got {shown(value)}')

    return dataclasses.replace(kind, check=check)


FLAG = Kind('true, false', {'type': 'boolean'}, check_flag)
