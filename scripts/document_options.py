"""Writes docs/Options.md and cdnsr_basicsr/options/schema.json from the dataclasses of the option blocks.

    python scripts/document_options.py [--check]     # --check: only says whether they are up to date
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cdnsr_basicsr  # noqa: E402

cdnsr_basicsr.register()

from cdnsr_basicsr import models  # noqa: E402
from cdnsr_basicsr.data.labeled_patch_dataset import LabeledPatches  # noqa: E402
from cdnsr_basicsr.data.photograph_dataset import Photographs  # noqa: E402
from cdnsr_basicsr.options.schema import fields_of, kind_of, required_in  # noqa: E402

FILES = {name: getattr(models, name).option_file for name in models.__all__}
DATASETS = {'LabeledPatchDataset': LabeledPatches, 'PhotographDataset': Photographs}
HEAD = '''# Options

The keys of option files for this package's models, block by block. `python scripts/document_options.py` generates this
page from the dataclasses that check and read the files. Any other key is refused by name. `basicsr train -opt FILE
--force_yml train:tau_min=0.5` sets a key without editing the file.

The column "default" has the value of a key that you leave out; `~` is none. Networks, losses, optimizers, schedulers
and metrics take the arguments of their constructors, and are checked against them. For option files of BasicSR's own
models, see BasicSR's documentation.

Editors with YAML support (VS Code with the extension YAML, others with yaml-language-server) complete and check option
files with the schema of this package, if the file names it in a comment, as the files in options/ do:

```yaml
# yaml-language-server: $schema=../cdnsr_basicsr/options/schema.json
```

Path of the installed schema: `python -c 'import cdnsr_basicsr.options as o; print(o.__path__[0] + "/schema.json")'`.
'''


def blocks() -> dict[str, list[tuple[type, list[str]]]]:
    """Blocks of an option file by place: the dataclasses that define each, with their models."""
    found: dict[str, list[tuple[type, list[str]]]] = {}

    def add(place: str, struct: type, model: str) -> None:
        entries = found.setdefault(place, [])
        for known, of in entries:
            if known is struct:
                of.append(model)
                break
        else:
            entries.append((struct, [model]))
        for name, field in fields_of(struct).items():
            inner = kind_of(field).struct
            if inner is not None:
                add(f'{place}.{name}'.lstrip('.'), inner, model)

    for model, struct in FILES.items():
        add('', struct, model)
    return found


def default_of(field: Any) -> str:
    if field.default is ...:
        return '**required**'
    if field.default is None:
        return '' if kind_of(field).struct else '`~`'
    return f'`{json.dumps(field.default)}`'.replace('"', '')


def table(entries: list[tuple[type, list[str]]], all_models: list[str]) -> str:
    """The table of a block's keys; keys that are the same in several models are listed once."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for struct, of in entries:
        for name, field in fields_of(struct).items():
            kind, meaning = kind_of(field), field.metadata['meaning']
            meaning += f' (trains the {kind.trains})' if kind.trains else ''
            row = (f'`{name}`', kind.words, default_of(field), meaning)
            rows.setdefault(row, []).extend(of)
    order = [name for struct, _ in entries for name in fields_of(struct)]
    several = any(set(of) != set(all_models) for of in rows.values())
    lines = [
        '| key | accepts | default | meaning |' + ' of |' * several, '| --- | --- | --- | --- |' + ' --- |' * several
    ]
    for row, of in sorted(rows.items(), key=lambda item: order.index(item[0][0].strip('`'))):
        models_of = 'all' if set(of) == set(all_models) else ', '.join(name.replace('Model', '') for name in of)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" + f' {models_of} |' * several)
    return '\n'.join(lines)


def reference() -> str:
    """docs/Options.md."""
    parts = [HEAD]
    for place, entries in blocks().items():
        of = [model for _, names in entries for model in names]
        title = f'`{place}`' if place else 'The file'
        only = '' if set(of) == set(FILES) else f' Of {", ".join(of)}.'
        parts.append(f"## {title}\n\n{' '.join((entries[0][0].__doc__ or '').split())}{only}\n\n{table(entries, of)}\n")
        if place == '':
            parts.append('`network_g` of CDNSRModel is a CDNSR, of PCSRModel a PCSR, of ETDSModel an ETDS; FastSRModel '
                         'and FastRealESRNetModel take any network.\n')
    for name, struct in DATASETS.items():
        parts.append(f"## `datasets`: `type: {name}`\n\n{' '.join((struct.__doc__ or '').split())}"
                     f"\n\n{table([(struct, ['']), ], [''])}\n")
    parts.append("For BasicSR's own datasets, see BasicSR's documentation.\n")
    return '\n'.join(parts)


def schema_of(struct: type) -> dict[str, Any]:
    """A block as JSON schema."""
    properties = {}
    for name, field in fields_of(struct).items():
        entry = {'description': field.metadata['meaning'], **kind_of(field).schema}
        if field.default is not ... and field.default not in (None, ()):
            entry['default'] = field.default
        properties[name] = entry
    return {
        'type': 'object',
        'description': ' '.join((struct.__doc__ or '').split()),
        'properties': properties,
        'additionalProperties': False,
        'required': required_in(struct)
    }


def json_schema() -> dict[str, Any]:
    """cdnsr_basicsr/options/schema.json; it accepts any key for models and datasets of others."""
    structs = {struct.__name__: struct for entries in blocks().values() for struct, _ in entries}
    structs.update({struct.__name__: struct for struct in DATASETS.values()})

    def when(key: str, value: str, struct: type) -> dict[str, Any]:
        condition = {'properties': {key: {'const': value}}, 'required': [key]}
        return {'if': condition, 'then': {'$ref': f'#/$defs/{struct.__name__}'}}

    of_types = [when('type', name, struct) for name, struct in DATASETS.items()]
    dataset = {'type': 'object', 'required': ['name', 'type'], 'allOf': of_types}
    definitions = {name: schema_of(struct) for name, struct in structs.items()}
    for struct in FILES.values():
        definitions[struct.__name__]['properties']['datasets'].update(
            type='object', additionalProperties={'$ref': '#/$defs/dataset'})
    return {
        '$schema': 'http://json-schema.org/draft-07/schema#',
        'title': 'Option file of BasicSR with cdnsr_basicsr',
        'type': 'object',
        'required': ['name', 'model_type'],
        'allOf': [when('model_type', model, struct) for model, struct in FILES.items()],
        '$defs': {
            **definitions, 'dataset': dataset
        },
    }


def pretty(value: Any, depth: int = 4, indent: str = '') -> str:
    """Formats JSON with one line for each key of a block."""
    if not isinstance(value, dict) or not value or depth == 0:
        return json.dumps(value)
    inner = indent + ' '
    lines = [f'{inner}{json.dumps(key)}: {pretty(item, depth - 1, inner)}' for key, item in value.items()]
    return '{\n' + ',\n'.join(lines) + f'\n{indent}}}'


def documents() -> dict[Path, str]:
    """The generated files and their contents."""
    return {
        ROOT / 'docs' / 'Options.md': reference(),
        ROOT / 'cdnsr_basicsr' / 'options' / 'schema.json': pretty(json_schema()) + '\n',
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action='store_true')
    checked = parser.parse_args().check
    stale = [
        path for path, text in documents().items() if not path.exists() or path.read_text(encoding='utf-8') != text
    ]
    for path in stale:
        print(f'{path.relative_to(ROOT)} is out of date' if checked else f'{path.relative_to(ROOT)} is written')
        if not checked:
            path.write_text(documents()[path], encoding='utf-8')
    return int(checked and bool(stale))


if __name__ == '__main__':
    sys.exit(main())
