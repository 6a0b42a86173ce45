"""Reading option files, without running anything that stands in them."""
from __future__ import annotations

import os
import re
import yaml
from typing import Any, Iterable, cast

from .values import OptionError

MAX_VALUES = 10**5  # of an option file
MAX_BYTES = 2**22


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that torchrun or Slurm has started."""
    return int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0


class OptionLoader(yaml.SafeLoader):
    """YAML loader that builds plain data only and reads ``2e-4`` as a number, as YAML 1.2 does.

    What a few lines of aliases could blow up to billions of values is refused before it is built.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self.values_in(node, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f'aliases expand it to more than {MAX_VALUES} values',
                                                    node.start_mark)
        return node

    def values_in(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Values in a node once all its aliases are written out; `known` holds those of the nodes already counted."""
        if id(node) not in known:
            known[id(node)] = MAX_VALUES + 1  # one that holds itself is infinite
            items = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for item in items for part in (item if isinstance(item, tuple) else (item, ))]
            known[id(node)] = 1 + sum(self.values_in(part, known) for part in parts)
        return known[id(node)]

    def construct_mapping_once(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == 'tag:yaml.org,2002:merge':
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key {key!r} appears twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


OptionLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
                             lambda loader, node: cast(Any, loader).construct_mapping_once(node, deep=True))


class OptionDumper(yaml.SafeDumper):
    """Writes what OptionLoader reads as the same values: text that looks like a number to it is quoted."""


FLOAT = re.compile(r'^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$')
for resolver in (OptionLoader, OptionDumper):
    resolver.add_implicit_resolver('tag:yaml.org,2002:float', FLOAT, list('-+0123456789'))


def read_options(path: str) -> dict[str, Any]:
    """Reads an option file without running anything that stands in it.

    Args:
        path: YAML file.

    Raises:
        OptionError: The file is missing, is no YAML mapping, or holds a tag other than YAML's own (such as
            ``!!python/object/apply``, which BasicSR's loader would execute).
    """
    return _parsed(_text_of(path), path)


def resolve_options(path: str, forced: Iterable[str]) -> tuple[dict[str, Any], str]:
    """Reads an option file and sets ``--force_yml`` entries in it.

    Returns:
        The options, and the text of a file that holds just these: the one that was read, or, where something is
        forced, one without its comments.

    Raises:
        OptionError: As read_options and apply_force_yml.
    """
    text = _text_of(path)
    opt, forced = _parsed(text, path), list(forced or ())
    try:
        apply_force_yml(opt, forced)
    except OptionError as error:
        raise OptionError(path, str(error)) from error
    if forced:
        said = ''.join(f'#   {" ".join(entry.split())}\n' for entry in forced)
        text = f'# {path!r}, with\n{said}' + yaml.dump(opt, Dumper=OptionDumper, sort_keys=False)
    return opt, text


def _text_of(path: str) -> str:
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise OptionError(path, 'no such option file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(path, f'cannot be read: {error}') from None
    if len(text) > MAX_BYTES:
        raise OptionError(path, f'is larger than an option file may be, {MAX_BYTES >> 20} MiB')
    return text


def _parsed(text: str, path: str) -> dict[str, Any]:
    try:
        opt = yaml.load(text, Loader=OptionLoader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else '?'
        raise OptionError(path, f'line {line}: {error.problem}; accepted: plain values, lists and mappings') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(path, f'not valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(opt, dict):
        raise OptionError(path, f'expected a mapping of options, but got {type(opt).__name__}')
    return opt


def parse_force_yml(entry: str) -> tuple[list[str], Any]:
    """Splits one ``--force_yml`` entry, ``key:sub=value``, into its keys and its value.

    Raises:
        OptionError: The entry has another form. BasicSR pastes the keys into code that it executes.
    """
    match = re.fullmatch(r'\s*([A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)*)\s*=([^=]*)', entry)
    if match is None:
        raise OptionError(f'--force_yml {entry}', 'accepted: key:sub=value, for example train:ema_decay=0.999')
    return match.group(1).split(':'), force_yml_value(match.group(2).strip())


def force_yml_value(text: str) -> Any:
    """The value of a ``--force_yml`` entry: a YAML scalar or list; ``None``, ``True`` and ``False`` in any case."""
    if text.lower() == 'none':
        return None
    try:
        return yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError:
        raise OptionError(f'--force_yml ...={text}', 'the value is not a YAML scalar or list') from None


def apply_force_yml(opt: dict[str, Any], entries: Iterable[str]) -> None:
    """Sets ``--force_yml`` entries in ``opt``, in place. A last key may be new, the way to it must exist."""
    for entry in entries:
        keys, value = parse_force_yml(entry)
        block = opt
        for key in keys[:-1]:
            if not isinstance(block.get(key), dict):
                blocks = ', '.join(str(name) for name, sub in block.items() if isinstance(sub, dict))
                raise OptionError(f'--force_yml {entry}', f'{key!r} is not a block of the file; accepted: {blocks}')
            block = block[key]
        block[keys[-1]] = value
