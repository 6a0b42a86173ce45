"""options/ is made out of scripts/backbones.yml and templates; adding a backbone is one row."""
import pytest
import shutil
import subprocess
import sys
import torch
from pathlib import Path

from basicsr.archs import build_network
from cdnsr_basicsr.options import checks, read_options

ROOT = Path(__file__).resolve().parent.parent
ROW = """
tiny:
  title: Tiny
  about: of this test
  note: '# A comment for all.'
  branches:
    FSRCNN 4: {type: FSRCNN, num_in_ch: 3, num_out_ch: 3, num_feat: 4, upscale: 4}
    ETDS 4: {type: ETDS, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, num_residual_feat: 3, upscale: 4}
    SPAN 4: {type: SPAN, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, upscale: 4}
  classifier: CLASSIFIER
  branch_lr: 3e-4
  stage2_batch: 8
  flops: {type: FLOPsLoss, target: 0.7, loss_weight: 2}
  classsr: {batch: 12}
  pcsr:
    backbone: {type: FSRCNN, num_feat: 4}
    heavy: [6]
    light: [4]
    classifier: []
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of what the script reads and writes, and a function that runs it there."""
    shutil.copytree(ROOT / 'options', tmp_path / 'options')
    (tmp_path / 'scripts').mkdir()
    for name in ('make_options.py', 'backbones.yml', 'option_templates.yml', 'train_all.sh'):
        shutil.copy(ROOT / 'scripts' / name, tmp_path / 'scripts')
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'Training.md', tmp_path / 'docs')

    def make(*args):
        command = [sys.executable, 'scripts/make_options.py', *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return tmp_path, make


def test_options_equal_what_the_script_makes():
    done = subprocess.run([sys.executable, str(ROOT / 'scripts/make_options.py'), '--check'],
                          capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr


@pytest.mark.slow
def test_files_that_differ_are_named_or_written(copy):
    folder, make = copy
    changed, missing, unknown = (folder / f'options/{name}.yml' for name in ('test_cdnsr_carn', 'train_etds_t_x2', 'a'))
    text = changed.read_text()
    changed.write_text(text.replace('save_img: true', 'save_img: false'))
    missing.unlink()
    unknown.write_text(text)
    page = folder / 'docs' / 'Training.md'
    training = page.read_text()
    page.write_text(training.replace('| `carn` | CARN-M 36', '| `carn` | CARN-M 37'))
    done = make('--check')
    assert done.returncode == 1 and done.stdout.splitlines() == [
        'options/test_cdnsr_carn.yml: differs', 'options/train_etds_t_x2.yml: differs', 'docs/Training.md: differs',
        'options/a.yml: not made by any template'
    ]
    assert not missing.exists() and changed.read_text() != text
    done = make()
    assert done.returncode == 0 and 'options/train_etds_t_x2.yml: written' in done.stdout
    assert changed.read_text() == text and page.read_text() == training
    assert unknown.read_text() == text, 'a file that somebody wrote is not touched'
    unknown.unlink()
    assert make('--check').returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize('classifier', ['errors', 'published'])
def test_a_backbone_is_one_row(copy, monkeypatch, classifier):
    folder, make = copy
    with (folder / 'scripts/backbones.yml').open('a') as table:
        table.write(ROW.replace('CLASSIFIER', classifier))
    before = {path.name for path in (folder / 'options').iterdir()}
    done = make()
    assert done.returncode == 0, done.stderr
    made = {path.stem: path for path in (folder / 'options').iterdir() if path.name not in before}
    assert sorted(made) == [
        'test_cdnsr_tiny', 'train_cdnsr_tiny', 'train_cdnsr_tiny_distill', 'train_cdnsr_tiny_joint',
        'train_classsr_tiny', 'train_pcsr_tiny_phase0', 'train_pcsr_tiny_phase1', 'train_tiny_branch1',
        'train_tiny_branch2', 'train_tiny_branch3'
    ]
    assert done.stdout.count('\n') == len(made) + 1 and 'docs/Training.md: written' in done.stdout
    usage = subprocess.run(['bash', 'scripts/train_all.sh'], cwd=folder, capture_output=True, text=True)
    assert '|srresnet|tiny [' in usage.stderr

    monkeypatch.setattr(checks, 'check_path', lambda value, where: None)
    monkeypatch.setattr('os.path.isfile', lambda path: True)
    opts = {name: read_options(str(path)) for name, path in made.items()}
    for name, opt in opts.items():
        assert opt['name'] == name
        assert '<' not in made[name].read_text(), 'a hole is left'
        assert ('# A comment for all.' in made[name].read_text()) == ('pcsr' not in name)
        checks.check_options(opt, name.startswith('train'))
        assert build_network(opt['network_g'])(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)
    assert [opts[f'train_tiny_branch{i}']['model_type']
            for i in (1, 2, 3)] == ['FastSRModel', 'ETDSModel', 'FastSRModel']
    assert [opts[f'train_tiny_branch{i}']['train']['optim_g']['lr'] for i in (1, 2, 3)] == [3e-4, 5e-4, 3e-4]
    assert [opts[f'train_tiny_branch{i}']['datasets']['train']['classes'] for i in (1, 2, 3)] == [[0], [1], [2]]
    stage2 = opts['train_cdnsr_tiny']
    assert stage2['datasets']['train']['batch_size_per_gpu'] == 8
    assert ('error_opt' in stage2['train']) == (classifier == 'errors')
    if classifier == 'published':
        assert stage2['train']['flops_opt'] == opts['train_cdnsr_tiny_joint']['train']['flops_opt']
        assert stage2['train']['flops_opt']['target'] == 0.7
    assert opts['train_classsr_tiny']['datasets']['train']['batch_size_per_gpu'] == 12
    assert opts['train_classsr_tiny']['network_g']['classifier']['type'] == 'PatchClassifier'
    assert make('--check').returncode == 0


@pytest.mark.parametrize('right, wrong, message', [
    ('tiny:', 'Tiny_1:', 'Tiny_1: expected a name of lower-case letters and digits'),
    ('  title: Tiny\n', '', 'tiny: title is missing'),
    ('  classsr:', '  clasr:', 'tiny: clasr is unknown'),
    ('CLASSIFIER', 'softmax', 'tiny: expected classifier: maps, errors or published'),
    ('    SPAN 4: {type: SPAN, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, upscale: 4}\n', '',
     'tiny: expected three branches'),
])  # yapf: disable
def test_a_row_that_makes_no_files_is_refused(copy, right, wrong, message):
    folder, make = copy
    assert right in ROW
    with (folder / 'scripts/backbones.yml').open('a') as table:
        table.write(ROW.replace(right, wrong).replace('CLASSIFIER', 'errors'))
    done = make()
    assert done.returncode == 2 and f'scripts/backbones.yml: {message}' in done.stderr
    assert 'written' not in done.stdout
