import numpy as np
import random
import torch
from os import path as osp

from basicsr.utils.dist_util import master_only
from ..checkpoint import save_checkpoint


def random_state(devices=()):
    """States of this process's random number generators, as values that torch.load accepts with weights_only=True.

    Args:
        devices (Iterable[int]): CUDA devices that this process uses. Default: none.

    Returns:
        dict: To be given to set_random_state.
    """
    version, numbers, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    state = {'python': [version, list(numbers), gauss], 'numpy': [keys.tolist(), *rest], 'torch': torch.get_rng_state()}
    return dict(state, cuda=[torch.cuda.get_rng_state(device) for device in devices])


def set_random_state(state, devices=()):
    """Sets the random number generators.

    Args:
        state (dict): What random_state returned.
        devices (Iterable[int]): CUDA devices that this process uses. Default: none.
    """
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    keys, *rest = state['numpy']
    np.random.set_state(('MT19937', np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    for device, device_state in zip(devices, state['cuda']):
        torch.cuda.set_rng_state(device_state, device)


class CompleteState:
    """Part of a model whose training states contain all that is needed to resume exactly.

    Beyond BasicSR's: gradient scaler, random states of every process, best metrics, and what `own_state` and
    `own_process_state` add.
    """

    def own_state(self):
        """What the model needs besides networks, optimizers, schedulers and scaler; the same in all processes."""
        return {}

    def own_process_state(self):
        """What each process needs for itself."""
        return {}

    def resume_own_state(self, state, process_state):
        """Goes on with both; the second is empty if the number of processes has changed."""

    def validation(self, dataloader, current_iter, tb_logger, save_img=False):
        with torch.random.fork_rng(self._cuda_devices()):  # validating more or less often does not change the training
            super(CompleteState, self).validation(dataloader, current_iter, tb_logger, save_img)
        if self.is_train:
            self._remember_best(current_iter)

    def save_training_state(self, epoch, current_iter):
        """Saves what resuming needs, complete or not at all.

        Args:
            epoch (int): Current epoch.
            current_iter (int): Current iteration; at -1, the end of training, there is nothing to resume.
        """
        if current_iter == -1:
            return
        processes = [{'random_state': random_state(self._cuda_devices()), **self.own_process_state()}]
        if self.opt['dist']:
            processes *= self.opt['world_size']
            torch.distributed.all_gather_object(processes, processes[0])
        self._save_state({
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'scaler': self.scaler.state_dict(),
            'best_metric_results': self._best_metric_results(),
            'processes': processes,
            **self.own_state()
        })

    @master_only
    def _save_state(self, state):
        save_checkpoint(state, self._state_path(state['iter']))

    def _state_path(self, current_iter):
        return osp.join(self.opt['path']['training_states'], f'{current_iter}.state')

    def _best_metric_results(self):
        """The best metrics so far as plain values; metrics are numpy numbers."""
        plain = {}
        for dataset, metrics in getattr(self, 'best_metric_results', {}).items():
            plain[dataset] = {metric: dict(best, val=float(best['val'])) for metric, best in metrics.items()}
        return plain

    @master_only
    def _remember_best(self, current_iter):
        """Adds a validation's best metrics to the training state of the same iteration, which was saved before it."""
        if osp.isfile(self._state_path(current_iter)):
            state = torch.load(self._state_path(current_iter), map_location='cpu', weights_only=True)
            self._save_state(dict(state, best_metric_results=self._best_metric_results()))

    def _cuda_devices(self):
        """CUDA devices that this process draws random numbers on."""
        if self.device.type != 'cuda':
            return []
        several = self.opt['num_gpu'] > 1 and not self.opt['dist']  # DataParallel takes all that it sees
        return list(range(torch.cuda.device_count())) if several else [torch.cuda.current_device()]

    def resume_training(self, resume_state):
        """Resumes from a training state.

        Args:
            resume_state (dict): What save_training_state has saved.
        """
        super(CompleteState, self).resume_training(resume_state)
        if resume_state.get('scaler'):  # empty but for float16
            self.scaler.load_state_dict(resume_state['scaler'])
        metrics = set((self.opt.get('val') or {}).get('metrics') or {})
        best = resume_state.get('best_metric_results', {})
        self.best_metric_results = {dataset: record for dataset, record in best.items() if set(record) == metrics}
        processes, process = resume_state.get('processes', []), {}
        if len(processes) == self.opt['world_size']:
            process = processes[self.opt['rank']]
            set_random_state(process['random_state'], self._cuda_devices())
        self.resume_own_state(resume_state, process)
