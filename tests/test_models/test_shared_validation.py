"""Validation that is shared among processes gives what one process gives."""
import json
import os
import pytest
import subprocess
import sys
import torch
import yaml
from pathlib import Path
from torch.utils.data import DataLoader

from basicsr.models import build_model
from tests.test_archs.test_cdnsr import spread
from tests.test_models.test_cdnsr_model import Images

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''
import json, os, sys, torch, yaml
from torch.utils.data import DataLoader
import cdnsr_basicsr
cdnsr_basicsr.register()
from basicsr.models import build_model
from tests.test_models.test_shared_validation import first_images, results
torch.distributed.init_process_group('gloo')
opt = yaml.safe_load(open('opt.yml'))
opt.update(dist=True, rank=int(os.environ['RANK']), world_size=2)
model = build_model(opt)
model.get_bare_model(model.net_g).load_state_dict(torch.load('net.pth'))
found = results(model, first_images(int(sys.argv[1])))
with open(f'results_{opt["rank"]}.json', 'w') as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
'''


def first_images(count):
    dataset = Images()
    dataset.__class__ = type('Images', (Images, ), {'__len__': lambda self: count})
    return dataset


def results(model, dataset):
    """Metrics, best metrics and what is logged about routing."""
    scalars = {}

    class Logger:

        def add_scalar(self, name, value, current_iter):
            scalars[name] = float(value)

        def add_image(self, *args, **kwargs):
            pass

    model.validation(DataLoader(dataset), 4, Logger() if model.opt['rank'] == 0 else None)
    return {
        'metrics': {
            key: float(value)
            for key, value in model.metric_results.items()
        },
        'scalars': scalars,
        'best': model._best_metric_results()
    }


@pytest.mark.parametrize('count', [3, 1])
def test_two_processes_validate_as_one(opt, tmp_path, count):
    model = build_model(yaml.safe_load(yaml.safe_dump(opt)))
    spread(model.net_g)
    torch.save(model.net_g.state_dict(), tmp_path / 'net.pth')
    single = results(model, first_images(count))
    (tmp_path / 'opt.yml').write_text(yaml.safe_dump(opt))
    (tmp_path / 'script.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
    done = subprocess.run(command + [str(count)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        shared = json.loads((tmp_path / f'results_{rank}.json').read_text())
        assert shared['metrics'] == pytest.approx(single['metrics'], abs=1e-6)
        assert shared['best']['images']['psnr']['val'] == pytest.approx(
            single['best']['images']['psnr']['val'], abs=1e-6)
        assert shared['best']['images']['psnr']['iter'] == 4
        assert shared['scalars'] == ({} if rank else pytest.approx(single['scalars'], abs=1e-6))
    assert len([name for name in single['scalars'] if 'count' in name]) == 3
