import numpy as np
import random
import torch


def random_state(device):
    """States of this process's random number generators, as values that torch.load accepts with weights_only=True."""
    version, numbers, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    state = {'python': [version, list(numbers), gauss], 'numpy': [keys.tolist(), *rest], 'torch': torch.get_rng_state()}
    if device.type == 'cuda':
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state, device):
    """Sets the random number generators to a random_state."""
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    keys, *rest = state['numpy']
    np.random.set_state(('MT19937', np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if device.type == 'cuda' and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'])
