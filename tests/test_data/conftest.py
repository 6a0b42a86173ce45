import cv2
import pytest

from cdnsr_basicsr.data.prepare import prepare
from tests.helpers import photograph


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / 'hr'
    folder.mkdir()
    for i in range(3):
        image = photograph(96, 128, i)
        image[:, :64] = image[:, :64] // (i + 2) + 60  # less contrast: easier
        cv2.imwrite(str(folder / f'{i}.png'), image)
    prepare(str(folder), str(tmp_path / 'out'), 4, (1, ), 32, 32)
    return tmp_path / 'out'
