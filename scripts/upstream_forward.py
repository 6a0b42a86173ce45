"""Runs archs and losses that lie in a BasicSR tree: built, forward and backward, evaluation, a state dict round trip.

Usage: python upstream_forward.py FILE [FILE ...], in the root of the tree: basicsr/archs/*_arch.py, basicsr/losses/*.py
Called by upstream_check.sh. Prints a line for each; exit code 1 if one has failed.
"""
import copy
import importlib
import inspect
import sys
import torch
import traceback

from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY

CARN = dict(type='CARN_M', num_feat=8)
FSRCNN = dict(type='FSRCNN', num_feat=4)
LAYERS = {'relu1_1': 64, 'relu2_1': 128, 'relu3_1': 256, 'relu4_1': 512, 'relu5_1': 512, 'conv5_4': 512}  # and channels
ARGUMENTS = {  # of those that have no defaults for all
    'CDNSR': dict(branches=[FSRCNN, CARN], classifier=dict(type='PatchClassifier')),
    'PCSR': dict(backbone=CARN),
    'VGG19Features': dict(layers=list(LAYERS), weights='random'),
}


def features(requires_grad=False):
    """As VGG19 would make them, by layer."""
    return {layer: torch.rand(4, channels, 8, 8, requires_grad=requires_grad) for layer, channels in LAYERS.items()}


def inputs_of_losses():
    """Arguments of each loss's forward, by the loss's name."""
    images = [torch.rand(4, 3, 32, 32, requires_grad=True) for _ in range(3)]
    students, teacher, negatives = [features(True), features(True)], features(), features()
    logits = torch.randn(4, 3, requires_grad=True)
    weights = logits.softmax(1)
    return {
        'AverageLoss': (weights, ),
        'ClassLoss': (weights, ),
        'FLOPsLoss': (weights, torch.tensor([0.9, 0.95, 1.])),
        'LabelLoss': (logits, torch.tensor([0, 1, 2, 0])),
        'ErrorLoss': (logits.exp(), torch.rand(4, 3)),
        'KDL1Loss': (images, weights),
        'FeatureDistillLoss': (students, teacher, weights),
        'CSDLoss': (students, teacher, negatives),
        'ContrastLoss': (students, teacher, negatives),
    }


def run(module, other, inputs):
    """Training with gradients, evaluation, and the same from the state dict of a copy.

    Args:
        module (nn.Module): Arch or loss.
        other (nn.Module): Another one, built alike.
        inputs (tuple): Arguments of forward.

    Returns:
        Tensor | dict[Tensor]: Output in evaluation mode.
    """
    output = module.train()(*inputs)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    assert all(tensor.isfinite().all() for tensor in outputs), 'not finite in training'
    params = [param for param in module.parameters() if param.requires_grad]
    if any(tensor.requires_grad for tensor in outputs):
        sum(tensor.square().mean() for tensor in outputs).backward()
        assert not params or any(param.grad is not None and param.grad.any() for param in params), 'no gradient'
    else:
        assert not params, 'its parameters have no graph'
    with torch.no_grad():
        for param in module.parameters():
            param.add_(0.01 * torch.randn_like(param))
        other.load_state_dict(copy.deepcopy(module.state_dict()))
        torch.manual_seed(0)
        output = module.eval()(*inputs)
        torch.manual_seed(0)
        again = other.eval()(*inputs)
    torch.testing.assert_close(again, output, atol=0, rtol=0)
    return output


def run_arch(name, cls):
    """Builds an arch by its option block and runs it on images of 16x24 pixels."""
    arguments = ARGUMENTS.get(name, {})
    nets = [build_network({'type': name, **copy.deepcopy(arguments)}) for _ in range(2)]
    output = run(*nets, (torch.rand(2, 3, 16, 24), ))
    upscale = getattr(nets[0], 'upscale', None)
    assert upscale is None or output.shape == (2, 3, 16 * upscale, 24 * upscale), output.shape


def run_loss(name, cls):
    """Builds a loss by its option block and runs it on random values."""
    losses = [build_loss({'type': name}) for _ in range(2)]
    known = inputs_of_losses()
    assert name in known, 'no inputs known: add them to inputs_of_losses in scripts/upstream_forward.py'
    run(*losses, known[name])


def run_other(name, cls):
    """Builds a module that is not registered and runs it on images."""
    modules = [cls(**ARGUMENTS[name]) for _ in range(2)]
    run(*modules, (torch.rand(2, 3, 32, 32, requires_grad=True), ))


def classes_of(path):
    """What of a file is to be run: what it registers, else all its modules; and how."""
    module = importlib.import_module(path[:-len('.py')].replace('/', '.'))
    registry, how = (ARCH_REGISTRY, run_arch) if '/archs/' in path else (LOSS_REGISTRY, run_loss)
    found = {name: cls for name, cls in registry if cls.__module__ == module.__name__}
    if found:
        return found, how
    modules = inspect.getmembers(module, lambda cls: inspect.isclass(cls) and issubclass(cls, torch.nn.Module))
    return {name: cls for name, cls in modules if cls.__module__ == module.__name__}, run_other


def main():
    failed = 0
    for path in sys.argv[1:]:
        found, how = classes_of(path)
        for name, cls in found.items():
            torch.manual_seed(0)
            try:
                how(name, cls)
                print(f'ok    {path}: {name} trains, evaluates and comes back from its state dict', flush=True)
            except Exception:
                failed += 1
                print(f'FAIL  {path}: {name}', traceback.format_exc(), sep='\n', flush=True)
    return failed > 0


if __name__ == '__main__':
    sys.exit(main())
