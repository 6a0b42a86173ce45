"""`--json`: one object on standard output that strict parsers read, and nothing else there."""
import argparse
import math
import os
import pytest
import subprocess
import sys

from cdnsr_basicsr import cli
from cdnsr_basicsr.cli import arguments
from cdnsr_basicsr.options import OptionError
from tests.helpers import documented, strict_json


@arguments.answers
def talkative(args, say):
    """A command that says something, and prints in all ways there are."""
    say('text\n', dict(psnr=math.nan, rows=[dict(ms=math.inf, shares=(1.5, -math.inf))], path='\udcff', none=None))
    print('printed', flush=True)
    os.write(1, b'written\n')
    subprocess.run([sys.executable, '-c', 'print("of a process")'], check=True)
    return 1


def test_nothing_else_gets_to_standard_output(capfd):
    print('before')
    assert talkative(argparse.Namespace(json=True)) == 1
    print('after')
    output, errors = capfd.readouterr()
    assert errors.splitlines() == ['printed', 'written', 'of a process']
    assert output.startswith('before\n{') and output.endswith('}\nafter\n')
    content = strict_json(output[len('before\n'):-len('after\n')])
    assert content == dict(psnr=None, rows=[dict(ms=None, shares=[1.5, None])], path='\udcff', none=None)
    assert talkative(argparse.Namespace(json=False)) == 1
    output, errors = capfd.readouterr()
    assert (output.splitlines(), errors) == (['text', 'printed', 'written', 'of a process'], '')


def test_of_a_command_that_fails_nothing_is_printed(capfd):

    @arguments.answers
    def fails(args, say):
        say('text\n', dict(a=1))
        raise OptionError('key', 'is wrong')

    with pytest.raises(OptionError):
        fails(argparse.Namespace(json=True))
    print('after')
    assert capfd.readouterr() == ('after\n', '')
    assert cli.main(['upscale', '-m', 'none.pth', '-i', '.', '-o', 'out', '--json']) == 2
    assert capfd.readouterr() == ('', 'basicsr: error: none.pth: no such checkpoint file\n')


def test_models(shipped, capfd):
    assert cli.main(['models']) == 0
    plain = capfd.readouterr().out
    assert cli.main(['models', '--json']) == 0
    output, errors = capfd.readouterr()
    models = strict_json(output)['models']
    assert errors == '' and [model['name'] for model in models] == ['tiny_cdnsr', 'tiny_fsrcnn']
    for model, row in zip(models, plain.splitlines()[1:]):
        assert set(model) == documented('models')
        assert os.path.getsize(model['file']) == model['bytes']
        figures = [f'x{model["scale"]}', f'{model["bytes"] / 1e6:.2f}', f'{model["psnr"]["Set5"]:.2f}']
        figures += [f'{model["psnr"]["Set14"]:.2f}', f'{model["ms_per_megapixel"]:.1f}']
        assert row.split() == [model['name'], *figures, model['licence']]
