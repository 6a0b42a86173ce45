"""Writes the files of options/ and the table of backbones in docs/Training.md.

Usage, in any folder:
    python scripts/make_options.py            # writes all files that differ from the templates
    python scripts/make_options.py --check    # only lists them; exit code 1 if there are any

To add a backbone, write its row in scripts/backbones.yml and run this script. scripts/option_templates.yml has what all
files of a kind share. Do not edit options/ by hand: a test compares it with the templates.
"""
import argparse
import re
import sys
import yaml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = 'docs/Training.md'  # has the table of backbones
REQUIRED = {'title', 'branches', 'classifier'}
OPTIONAL = {'about', 'note', 'order', 'branch_lr', 'stage2_batch', 'flops', 'classsr', 'pcsr'}
ETDS_SIZES = {'T': (5, 16), 'S': (4, 32), 'M': (6, 32), 'L': (7, 48)}  # blocks, width


def read(path):
    return path.read_text(encoding='utf-8') if path.is_file() else None


def text(value):
    """A dict or list as YAML in one line; anything else as a string."""
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    return '' if value is None else str(value)


def fill(template, values):
    """Replaces the placeholders of a template (option_templates.yml says how)."""
    lines = []
    for line in template.splitlines():
        alone = re.fullmatch(r'( *)<(\w+)>', line)
        if alone:
            lines += [alone[1] + part for part in fill(text(values[alone[2]]), values).splitlines()]
        else:
            lines.append(re.sub(r'<(\w+)>', lambda hole: fill(text(values[hole[1]]), values), line))
    return '\n'.join(lines)


class Maker:
    """Makes option files from templates.

    Args:
        templates (dict): Content of option_templates.yml.

    Attributes:
        files (dict[str, str]): Names and contents of the files made so far.
    """

    def __init__(self, templates):
        self.templates = templates
        self.files = {}

    def kind(self, name):
        values = self.templates['kinds'][name]
        return {**self.kind(values['like']), **values} if 'like' in values else values

    def add(self, name, row, **values):
        """Makes a file of a kind. Values of the kind override those of the row, and `values` are defaults of both."""
        kind = self.kind(name)
        values = {**self.templates['usual'], **row, **kind, **values}
        self.files[fill('options/<name>.yml', values)] = fill(self.templates['frames'][kind['frame']], values) + '\n'

    def add_backbone(self, backbone, row):
        """Makes all files of a row of backbones.yml."""
        networks = [text(network) for network in row['branches'].values()]
        kind = row['classifier']
        values = dict(row, backbone=backbone, classifier=f'<{kind}>', tile=f'<tile_{kind}>')
        stages = kind.replace('maps', 'errors')
        values['branches'] = '\n'.join(f'- {network}' for network in networks)
        values.update((f'branch{i}', network) for i, network in enumerate(networks, 1))
        values.update((f'pcsr_{key}', value) for key, value in row.get('pcsr', {}).items())
        parts = ('easiest', 'middle', 'hardest')
        for i, ((branch, network), part) in enumerate(zip(row['branches'].items(), parts)):
            kind = f"branch_{network['type']}"
            kind = kind if kind in self.templates['kinds'] else 'branch'
            self.add(kind, values, branch=branch, branch_network=network, number=i + 1, label=i, part=part)
        for kind in (f'classifier_{stages}', f'joint_{stages}', 'distill', 'test_cdnsr'):
            self.add(kind, values)
        if 'classsr' in row:
            self.add('classsr', values, **row['classsr'])
        if 'pcsr' in row:
            self.add('pcsr_phase0', values)
            self.add('pcsr_phase1', values)
        for kind in self.templates['kinds']:
            if self.kind(kind).get('row') == backbone:
                self.add(kind, values)

    def add_etds(self):
        for size, (blocks, width) in ETDS_SIZES.items():
            for scale in (2, 3, 4):
                values = dict(size=size.lower(), scale=scale, gt_size=64 * scale, blocks=blocks, width=width)
                values['etds'] = f'ETDS-{size} (M{blocks}C{width})'
                self.add('etds', values)
                if (size, scale) == ('M', 4):
                    self.add('test_etds', values)


def mistake_in(backbones):
    """One line about the first invalid row, or None."""
    for backbone, row in backbones.items():
        wrong = [f'{key} is missing' for key in sorted(REQUIRED - set(row))]
        wrong += [f'{key} is unknown' for key in sorted(set(row) - REQUIRED - OPTIONAL)]
        if not re.fullmatch('[a-z0-9]+', backbone):
            wrong.append('expected a name of lower-case letters and digits')
        if len(row.get('branches', ())) != 3:
            wrong.append('expected three branches')
        if row.get('classifier') not in ('maps', 'errors', 'published'):
            wrong.append('expected classifier: maps, errors or published')
        if wrong:
            return f"{backbone}: {', '.join(wrong)}"


def with_table(page, backbones):
    """Returns a page whose table with a column BACKBONE has a row for each backbone."""
    rows = []
    for backbone, row in sorted(backbones.items()):
        branches = ', '.join(row['branches']) + (f": {row['about']}" if 'about' in row else '')
        others = ['yes' if key in row else '-' for key in ('classsr', 'pcsr')]
        classifier = {'maps': 'maps errors', 'errors': 'predicts errors', 'published': 'published'}[row['classifier']]
        rows.append(f"| `{backbone}` | {' | '.join([branches, classifier, *others])} |\n")
    return re.sub(r'(\| BACKBONE \|.*\n\|[ -|]*\n)(?:\|.*\n)*', lambda head: head[1] + ''.join(rows), page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='only list the files that differ')
    args = parser.parse_args()
    backbones = yaml.safe_load(read(ROOT / 'scripts' / 'backbones.yml'))
    if mistake_in(backbones):
        parser.error(f'scripts/backbones.yml: {mistake_in(backbones)}')

    maker = Maker(yaml.safe_load(read(ROOT / 'scripts' / 'option_templates.yml')))
    for backbone, row in backbones.items():
        maker.add_backbone(backbone, row)
    maker.add_etds()
    wanted = dict(maker.files, **{PAGE: with_table(read(ROOT / PAGE), backbones)})

    differing = [name for name, content in wanted.items() if read(ROOT / name) != content]
    for name in differing:
        if not args.check:
            (ROOT / name).write_text(wanted[name], encoding='utf-8')
        print(f"{name}: {'differs' if args.check else 'written'}")
    unknown = sorted(path.name for path in (ROOT / 'options').glob('*.yml') if f'options/{path.name}' not in wanted)
    for name in unknown:
        print(f'options/{name}: not made by any template')
    return int(args.check and bool(differing or unknown))


if __name__ == '__main__':
    sys.exit(main())
