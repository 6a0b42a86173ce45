"""Trains networks for the same time each, on one CPU core, and says how good they are after which part of it.

Usage, in a folder with datasets/train (basicsr prepare), and folders with gt and lq (basicsr prepare --whole):
    taskset -c 0 python scripts/compare_training.py --minutes 120 --val datasets/held datasets/Set14 -o compare.csv \\
        'SPANV2 options/train_modern_branch1.yml' \\
        'SPANV2, lr 2e-3 options/train_modern_branch1.yml train:optim_g:lr=2e-3' ...
    python scripts/compare_training.py --plot compare.png compare.csv

Each run is a name, an option file and changes to it, as --force_yml takes them. First, and while nothing else should be
running, an iteration of each is timed; the schedule is given as many iterations as fill the time, and the minutes in
the table are theirs, whatever else the machine does later. Validation is not counted. What has been stopped goes on;
what is finished is passed over. PSNR is RGB, with a border of as many pixels as the scale left out, of the EMA weights,
if there are any.
"""
import argparse
import csv
import json
import os
import re
import subprocess
import sys
import yaml
from pathlib import Path

TIMED = 70  # iterations that are timed
PRINTED, SAVED = 10, 500  # iterations from one line of the log, and at most from one checkpoint, to the next
ITERATION = re.compile(r'iter:\s*([\d,]+), lr:.*time \(data\): ([\d.]+)')
VALIDATION = re.compile(r'Validation (\S+)')
PSNR = re.compile(r'# psnr: ([\d.]+)')


def parse(run):
    """Name, option file and changes of a run."""
    words = run.split()
    path = next((word for word in words if word.endswith('.yml')), None)
    if path is None:
        raise SystemExit(f'{run}: expected a name, an option file and changes to it')
    place = words.index(path)
    return ' '.join(words[:place]), path, words[place + 1:]


def train(path, changes, iterations, name, points, folders):
    """Trains, and returns the log that stands in the experiment."""
    opt, every = yaml.safe_load(Path(path).read_text()), max(1, iterations // points)
    data = dict(opt['datasets']['train'], num_worker_per_gpu=0)
    if 'classes' in data:  # all patches, instead of those of one difficulty
        data.update(classes=None, label_file=None)
    opt['datasets'] = dict(train=data)
    for folder in folders:
        block = dict(name=Path(folder).name, type='PairedImageDataset', io_backend=dict(type='disk'))
        block.update(dataroot_gt=f'{folder}/gt', dataroot_lq=f'{folder}/lq')
        opt['datasets'][f'val_{block["name"]}'] = block
    opt['val'].update(val_freq=every, metrics=dict(psnr=dict(type='calculate_psnr', crop_border=opt['scale'])))
    opt['logger'].update(print_freq=PRINTED, save_checkpoint_freq=min(every, SAVED), use_tb_logger=False)
    opt['train'].update(total_iter=iterations, scheduler=dict(opt['train']['scheduler'], periods=[iterations]))
    opt['name'] = name
    file = Path('experiments', f'{name}.yml')
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(opt))
    command = [sys.executable, '-m', 'cdnsr_basicsr', 'train', '-opt', str(file), '--auto_resume']
    command += ['--force_yml', *changes] if changes else []
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f'{name} ended with exit code {done.returncode}')
    return ''.join(log.read_text() for log in sorted(Path('experiments', name).glob('train_*.log')))


def seconds_of(log):
    """Seconds of an iteration, the first ones not counted."""
    times = [float(seconds) for number, seconds in ITERATION.findall(log) if int(number.replace(',', '')) > PRINTED]
    return sorted(times)[len(times) // 2]


def plan_file(title):
    """Where it stands how long an iteration of a run takes."""
    return Path('experiments', 'compare_' + re.sub(r'\W+', '_', title) + '.json')


def plan_of(run, minutes, points):
    """Name of the run's experiment, how many iterations fill the time, and the seconds of one, timed once."""
    title, path, changes = parse(run)
    file = plan_file(title)
    name = file.stem
    if not file.is_file():
        seconds = seconds_of(train(path, changes, TIMED, f'{name}_timed', 1, []))
        iterations = max(1, round(60 * minutes / seconds / points / PRINTED)) * PRINTED * points
        file.write_text(json.dumps(dict(iterations=iterations, seconds=seconds)))
    return dict(json.loads(file.read_text()), name=name)


def compare(run, plan, points, folders):
    """Rows of a run: name, iteration, minutes, and the PSNR of each validation set."""
    title, path, changes = parse(run)
    rows, at, dataset = {}, 0, None
    for line in train(path, changes, plan['iterations'], plan['name'], points, folders).splitlines():
        if (found := ITERATION.search(line)):
            at = int(found.group(1).replace(',', ''))
        elif (found := VALIDATION.search(line)):
            dataset = found.group(1)
        elif (found := PSNR.search(line)):
            row = rows.setdefault(at, dict(name=title, iteration=at, minutes=round(at * plan['seconds'] / 60, 2)))
            row[f'PSNR {dataset}'] = float(found.group(1))
    return list(rows.values())


def minutes_of(row):
    """Minutes of a row; where the iterations were done elsewhere (train_on_gpu.py), as they would be on the core."""
    if 'minutes' in row:
        return float(row['minutes'])
    return int(row['iteration']) * json.loads(plan_file(row['name']).read_text())['seconds'] / 60


def plot(rows, path):
    """PSNR over time, a figure for each validation set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    datasets = [key for key in rows[0] if key.startswith('PSNR')]
    figure = Figure(figsize=(6 * len(datasets), 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets):
        for i, name in enumerate(dict.fromkeys(row['name'] for row in rows)):
            points = [(minutes_of(row), float(row[key])) for row in rows if row['name'] == name]
            axes.plot(*zip(*points), f'C{i % 10}{"-" if i < 10 else "--"}', marker='o', markersize=3, label=name)
        axes.set(xlabel='minutes of training on one core', ylabel=f'{key}, dB')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', help='runs, or the tables to plot')
    parser.add_argument('--minutes', type=float, default=120)
    parser.add_argument('--val', nargs='+', default=[], help='folders with gt and lq')
    parser.add_argument('--points', type=int, default=8, help='validations of a run (default: 8)')
    parser.add_argument('-o', dest='out', help='table to write (.csv), after every run')
    parser.add_argument('--plot', help='image file of the plot')
    args = parser.parse_args()
    if args.plot:
        plot([row for path in args.runs for row in csv.DictReader(open(path, newline=''))], args.plot)
        return
    rows, plans = [], [plan_of(run, args.minutes, args.points) for run in args.runs]
    for run, plan in zip(args.runs, plans):
        rows += compare(run, plan, args.points, args.val)
        print(f'{rows[-1]}', flush=True)
        if args.out:
            with open(args.out, 'w', newline='') as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == '__main__':
    main()
