import itertools
import json
import pytest
import torch
import weakref
from types import SimpleNamespace

from cdnsr_basicsr import complexity
from cdnsr_basicsr.inference import speed
from cdnsr_basicsr.inference.speed import Speed, measured_speed

CPU = torch.device('cpu')


class Part:
    """Notes the batches that it gets; memory suffices for `most` tiles."""

    def __init__(self, most=1000):
        self.batches, self.most = [], most

    def __call__(self, tiles):
        self.batches.append(tiles.shape)
        if len(tiles) > self.most:
            raise torch.OutOfMemoryError('too many')
        return tiles


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of speeds; each pass takes the same time."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    clock = itertools.count(0, 0.01)
    monkeypatch.setattr(complexity, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    return tmp_path / 'cdnsr_basicsr/speed.json'


def test_a_part_is_measured_once_for_its_description(cache):
    part = Part()
    first = measured_speed([part, part], ['a', 'a'], 16, 3, CPU)
    assert first.max_tiles[0] in (1, 2, 4, 8) and min(first.tile_ms) > 0
    assert first.max_tiles[0] == first.max_tiles[1] and first.tile_ms[0] == first.tile_ms[1]
    assert {shape[1:] for shape in part.batches} == {(3, 16, 16)}
    again = Part()
    assert measured_speed([again], ['a'], 16, 3, CPU) == Speed(first.max_tiles[:1], first.tile_ms[:1])
    assert again.batches == []
    for name, patch_size, channels in (('b', 16, 3), ('a', 20, 3), ('a', 16, 1)):
        other = Part()
        measured_speed([other], [name], patch_size, channels, CPU)
        assert other.batches
    assert len(json.loads(cache.read_text())) == 4


def test_fresh_measures_again(cache):
    measured_speed([Part()], ['a'], 16, 3, CPU)
    part = Part()
    measured_speed([part], ['a'], 16, 3, CPU, fresh=True)
    assert part.batches and len(json.loads(cache.read_text())) == 1


@pytest.mark.parametrize('content', ['', '[1, 2]', '{"half', '{"KEY": "x"}', '{"KEY": [1]}'])
def test_a_broken_cache_is_measured_again(cache, content):
    measured_speed([Part()], ['a'], 16, 3, CPU)
    key, = json.loads(cache.read_text())
    cache.write_text(content.replace('KEY', key))
    part = Part()
    assert measured_speed([part], ['a'], 16, 3, CPU).tile_ms[0] > 0
    assert part.batches and isinstance(json.loads(cache.read_text())[key], list)


def test_what_was_cut_short_by_memory_is_kept(cache):
    assert measured_speed([Part(most=2)], ['a'], 16, 3, CPU).max_tiles == [2]
    again = Part()
    assert measured_speed([again], ['a'], 16, 3, CPU) == Speed([2], [pytest.approx(5)]) and not again.batches
    assert measured_speed([again], ['a'], 16, 3, CPU, fresh=True) == Speed([8], [pytest.approx(10 / 8)])
    with pytest.raises(torch.OutOfMemoryError):
        measured_speed([Part(most=0)], ['b'], 16, 3, CPU)


def test_no_memory_stays_reserved(cache, monkeypatch):
    batches, left = [], []

    def part(tiles):
        batches.append(weakref.ref(tiles))
        if len(tiles) > 2:
            raise torch.OutOfMemoryError('too many')

    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: left.append([batch() for batch in batches]))
    measured_speed([part], ['a'], 16, 3, CPU)
    assert left == [[None] * len(batches)]  # given back once, when nothing held them any more


def test_what_was_measured_in_a_busy_minute_is_not_kept(cache, monkeypatch):
    times = {1: (0.1, True), 2: (0.1, False), 4: (0.4, True), 8: (0.8, True)}
    with monkeypatch.context() as context:
        context.setattr(speed, 'measure_latency', lambda part, tiles: times[len(tiles)])
        assert measured_speed([Part()], ['a'], 16, 3, CPU) == Speed([2], [50.])
    assert not cache.exists()
    assert measured_speed([Part()], ['a'], 16, 3, CPU) == Speed([8], [pytest.approx(10 / 8)])
    assert cache.exists()


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert measured_speed([Part()], ['a'], 16, 3, CPU).tile_ms[0] > 0


def test_other_processes_entries_stay(cache):

    def part(tiles):
        speed.remember(cache, 'theirs', [4, 1.])
        return tiles

    measured_speed([part], ['a'], 16, 3, CPU)
    assert len(json.loads(cache.read_text())) == 2
