import torch
from collections import OrderedDict
from os import path as osp
from torch import nn as nn
from torchvision.models import vgg as vgg

from basicsr.archs.vgg_arch import NAMES, VGG_PRETRAIN_PATH, VGGFeatureExtractor

URL = 'https://download.pytorch.org/models/vgg19-dcbb9e9d.pth'


def find_imagenet_weights():
    """Weights of torchvision's VGG19: from BasicSR's usual place, else from torchvision's, which downloads them once.

    Returns:
        dict: Weights by name.
    """
    if osp.isfile(VGG_PRETRAIN_PATH):
        return read_weights(VGG_PRETRAIN_PATH)
    try:
        return torch.hub.load_state_dict_from_url(URL, map_location='cpu', weights_only=True)
    except Exception as error:  # no network, no space, half a file: the remedy is the same
        raise ValueError(f'the imagenet weights of VGG19 are neither at {VGG_PRETRAIN_PATH} nor in '
                         f'{torch.hub.get_dir()}/checkpoints, and cannot be downloaded ({error}); '
                         f'put {URL} at one of these places') from error


def read_weights(path):
    """Reads a file of VGG19 weights.

    Args:
        path (str): File with weights under torchvision's names.

    Returns:
        dict: Weights by name.
    """
    if not osp.isfile(path):
        raise ValueError(f"expected 'imagenet', 'random' or a file of VGG19 weights, but {path!r} is not a file")
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what the unpickler raises on a broken file has no common type
        raise ValueError(f'{path} cannot be read: {" ".join(str(error).split())[:200]}') from error


class VGG19Features(VGGFeatureExtractor):
    """BasicSR's VGG19 feature extractor, with a choice of weights.

    BasicSR's own always takes or downloads the imagenet weights. Here only the layers that are used are built. It
    never learns.

    Args:
        layers (list[str]): Layers whose features are returned, such as 'relu5_1'.
        weights (str): 'imagenet' | path of a file with torchvision's names | 'random'. Random weights are for tests and
            for machines without the file; they see texture, not meaning. Default: 'imagenet'.

    Raises:
        ValueError: A layer is unknown, or the weights cannot be had.
    """

    def __init__(self, layers, weights='imagenet'):
        nn.Module.__init__(self)  # that of VGGFeatureExtractor would download
        names = NAMES['vgg19']
        for layer in layers:
            if layer not in names:
                raise ValueError(f"unknown layer {layer!r} of VGG19; accepted: {', '.join(names)}")
        self.layer_name_list = list(layers)
        self.use_input_norm = True
        self.range_norm = False
        with torch.random.fork_rng(devices=[]):  # random weights are the same in every process and after resuming
            torch.manual_seed(0)
            features = vgg.make_layers(vgg.cfgs['E'])[:max(names.index(layer) for layer in layers) + 1]
            for module in features.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
                    nn.init.zeros_(module.bias)
        if weights != 'random':
            state = find_imagenet_weights() if weights == 'imagenet' else read_weights(weights)
            try:
                features.load_state_dict({name: state[f'features.{name}'] for name in features.state_dict()})
            except (KeyError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f'{weights} contains no weights of VGG19: {" ".join(str(error).split())[:200]}') from error
        self.vgg_net = nn.Sequential(OrderedDict(zip(names, features)))
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()
