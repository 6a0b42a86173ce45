import numpy as np
import random
import torch


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
