"""Memory that is freed stays in the process."""
import pytest
import subprocess
import sys

CODE = """
import sys
import torch
from pathlib import Path
from cdnsr_basicsr.memory import keep_freed_memory


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


kept = sys.argv[1] == 'keep' and keep_freed_memory()
block = torch.ones(2**26)  # 256 MiB
full = resident()
del block
print(int(kept), int(resident() > full - 2**26))
"""


def left(argument):
    return subprocess.run([sys.executable, '-c', CODE, argument], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_freed_memory_is_kept_only_if_asked():
    assert left('give back').split() == ['0', '0']
    assert left('keep').split() == ['1', '1']
