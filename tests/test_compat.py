import numpy
import pytest
import random
import subprocess
import sys
import torch
from types import SimpleNamespace

from cdnsr_basicsr import _compat
from cdnsr_basicsr.options import OptionError


def test_stand_ins_are_asked_last_and_once():
    _compat.provide_missing_modules()
    _compat.provide_missing_modules()
    finders = [finder for finder in sys.meta_path if isinstance(finder, _compat._MissingModuleFinder)]
    assert len(finders) == 1 and sys.meta_path.index(finders[0]) > 0
    assert finders[0].find_spec('no_such_module') is None


@pytest.mark.slow
def test_removed_modules_are_found_and_work():
    # in a process of its own, in which nothing else provides distutils
    code = '''
import sys
import torch
class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.startswith('distutils'):
            stand_ins = [finder for finder in sys.meta_path if type(finder).__name__ == '_MissingModuleFinder']
            return stand_ins[0].find_spec(name)
sys.modules.pop('distutils', None)
import cdnsr_basicsr
sys.meta_path.insert(0, NoDistutils())
from distutils.version import LooseVersion
assert LooseVersion('0.10.0') >= LooseVersion('0.9.0') and LooseVersion('0.22.1+cu130') >= LooseVersion('0.9.0')
import basicsr
from basicsr.data.degradations import rgb_to_grayscale
import torch
assert rgb_to_grayscale(torch.rand(1, 3, 4, 4)).shape == (1, 1, 4, 4)
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_patching_twice_changes_nothing():
    import basicsr.train
    from basicsr.models.base_model import BaseModel
    before = (basicsr.train.parse_options, basicsr.train.load_resume_state, BaseModel.model_to_device)
    _compat.patch_basicsr()
    assert before == (basicsr.train.parse_options, basicsr.train.load_resume_state, BaseModel.model_to_device)


def test_help_needs_neither_torch_nor_basicsr():
    code = ("import sys; from cdnsr_basicsr import cli; cli.build_parser()\n"
            "assert not {'torch', 'basicsr', 'cv2', 'numpy'} & set(sys.modules)")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_launcher_without_torchrun_is_explained(monkeypatch):
    from basicsr.utils.dist_util import init_dist
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    with pytest.raises(OptionError, match='torchrun --nproc_per_node=N -m cdnsr_basicsr'):
        init_dist('pytorch')


@pytest.mark.parametrize('launcher,variable', [('pytorch', 'LOCAL_WORLD_SIZE'), ('slurm', 'SLURM_NTASKS_PER_NODE')])
def test_processes_need_a_gpu_each(monkeypatch, launcher, variable):
    for name, value in (('RANK', '0'), ('SLURM_NODELIST', 'node1'), (variable, '3')):
        monkeypatch.setenv(name, value)
    backends, uuids = [], ['a', 'b', 'a']
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.cuda.current_device', lambda: 0)
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda device: SimpleNamespace(uuid=uuids[0]))
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 3)

    def all_gather_object(objects, own):
        assert own[1] == uuids[0]
        objects[:] = [(own[0], uuid) for uuid in uuids]

    monkeypatch.setattr('torch.distributed.all_gather_object', all_gather_object)
    init_dist = _compat._init_dist_anywhere(lambda launcher, backend, **kwargs: backends.append(backend))
    with pytest.raises(OptionError, match='3 processes on a machine with 2 GPUs: each needs one'):
        init_dist(launcher)
    uuids[2] = 'c'
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)  # its own, as each of the others sees its own
    init_dist(launcher)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 3)
    init_dist(launcher)
    init_dist(launcher, 'mpi')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    init_dist(launcher)
    assert backends == ['cpu:gloo,cuda:nccl'] * 3 + ['mpi', 'gloo']


@pytest.mark.parametrize('gpu,given,pinned', [(True, {}, True), (True, {
    'pin_memory': False
}, False), (False, {}, None)])
def test_batches_for_a_gpu_are_pinned(monkeypatch, gpu, given, pinned):
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpu)
    opt = {'num_gpu': 1, 'datasets': {'train': dict(given)}, 'manual_seed': 0, 'rank': 0}
    parsed, _ = _compat._checked_parse_options(lambda root_path, is_train: (opt, None))('.')
    assert parsed['datasets']['train'].get('pin_memory') is pinned and parsed['num_gpu'] == int(gpu)


def test_a_forced_seed_is_the_one_that_is_used():

    def drawn(seed):
        parsed = {'num_gpu': 0, 'manual_seed': seed, 'rank': 0}  # BasicSR has drawn from the seed of the file by then
        torch.manual_seed(1)
        _compat._checked_parse_options(lambda root_path, is_train: (parsed, None))('.', False)
        return torch.rand(3).tolist(), random.random(), numpy.random.rand()

    assert drawn(5) == drawn(5) != drawn(6)


@pytest.fixture
def stock_model(tmp_path):
    """A BasicSR model that has nothing but where to save."""
    from basicsr.models.base_model import BaseModel
    model = BaseModel({
        'num_gpu': 0,
        'is_train': True,
        'rank': 0,
        'path': {
            'models': str(tmp_path),
            'training_states': str(tmp_path)
        }
    })
    return model


def test_stock_models_save_complete_files_or_none(stock_model, tmp_path, monkeypatch):
    net = torch.nn.Linear(2, 2)
    stock_model.save_network(net, 'net_g', 4)
    stock_model.save_training_state(0, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['4.state', 'net_g_4.pth']
    assert torch.equal(torch.load(tmp_path / 'net_g_4.pth')['params']['weight'], net.weight)
    assert stock_model.opt['path']['models'] == str(tmp_path)

    def killed(content, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', killed)
    before = (tmp_path / 'net_g_4.pth').read_bytes()
    for save in (lambda: stock_model.save_network(net, 'net_g', 4), lambda: stock_model.save_training_state(0, 8)):
        with pytest.raises(KeyboardInterrupt):
            save()
    assert (tmp_path / 'net_g_4.pth').read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['4.state', 'net_g_4.pth']
    assert stock_model.opt['path']['models'] == str(tmp_path)

    def full(content, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', full)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(OSError, match='net_g_4.pth cannot be written; is the disk full'):  # which BasicSR passes over
        stock_model.save_network(net, 'net_g', 4)
    assert (tmp_path / 'net_g_4.pth').read_bytes() == before


def test_a_network_of_which_nothing_is_saved_keeps_its_path_when_resuming(tmp_path):
    torch.save({'iter': 4}, tmp_path / '4.state')
    for name in ('net_g_4.pth', 'net_d_4.pth', 'net_f_2.pth'):
        (tmp_path / name).write_bytes(b'')
    path = {'resume_state': str(tmp_path / '4.state'), 'models': str(tmp_path), 'pretrain_network_t': 'teacher.pth'}
    opt = {
        'auto_resume': False,
        'rank': 0,
        'path': path,
        'network_g': {},
        'network_d': {},
        'network_f': {},
        'network_t': {}
    }
    assert _compat._load_resume_state(opt)['iter'] == 4
    assert path['pretrain_network_g'] == str(tmp_path / 'net_g_4.pth')
    assert path['pretrain_network_d'] == str(tmp_path / 'net_d_4.pth')
    assert path['pretrain_network_f'] == str(tmp_path / 'net_f_4.pth')  # is missing, which loading will say
    assert path['pretrain_network_t'] == 'teacher.pth'


def test_an_lmdb_is_read_by_several_datasets_of_a_process(tmp_path):
    import lmdb

    from basicsr.utils import FileClient
    path = str(tmp_path / 'a.lmdb')
    with lmdb.open(path) as environment, environment.begin(write=True) as transaction:
        transaction.put(b'key', b'value')
    clients = [FileClient('lmdb', db_paths=paths, client_keys=keys) for paths, keys in (([path], ['lq']), (path, 'gt'))]
    assert [client.get('key', key) for client, key in zip(clients, ('lq', 'gt'))] == [b'value'] * 2
    clients[0].client._client['lq'].close()
    assert FileClient('lmdb', db_paths=path, client_keys='lq').get('key', 'lq') == b'value'


def test_a_prefetcher_begins_to_read_once():
    from basicsr.data.prefetch_dataloader import CPUPrefetcher

    class Loader(list):
        begun = 0

        def __iter__(self):
            self.begun += 1
            return super().__iter__()

    loader = Loader([1, 2])
    prefetcher = CPUPrefetcher(loader)
    prefetcher.reset()  # as BasicSR's training does before the first batch
    assert [prefetcher.next() for _ in range(3)] == [1, 2, None] and loader.begun == 1
    prefetcher.reset()
    assert prefetcher.next() == 1 and loader.begun == 2
    assert CPUPrefetcher(loader).next() == 1


def test_an_error_in_prefetching_is_not_waited_for():
    from basicsr.data.prefetch_dataloader import PrefetchDataLoader

    class Broken(torch.utils.data.Dataset):

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return index if index == 0 else None + index

    items = iter(PrefetchDataLoader(num_prefetch_queue=1, dataset=Broken()))
    assert next(items).item() == 0
    with pytest.raises(TypeError, match='NoneType'):
        next(items)
