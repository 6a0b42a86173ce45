"""Blocks of networks: checked against their constructors, and built."""
from __future__ import annotations

import contextlib
import inspect
import re
import sys
from typing import Any, Iterable, Iterator, Mapping

from .values import MAX_NUMBER, OptionError, check_flag, check_keys, check_number, check_path, one_line, shown

# what no network of use goes beyond; a mistake or a broken file does
MAX_SCALE = 16
MAX_DEPTH = 1000  # blocks, also those of all groups together
MAX_LAYERS = 50000
MAX_WEIGHTS = 2**30
# arguments that say how often something is repeated
DEPTHS = ('depths', 'num_block', 'num_blocks', 'num_group', 'num_map', 'num_conv', 'num_mlp', 'num_layer', 'num_d',
          'n_layers_d', 'num_extract_block', 'num_reconstruct_block')
# arguments of BasicSR's networks that are fractions, though their defaults are written as integers
FRACTIONS = ('res_scale', 'max_residue_magnitude', 'narrow')


def find_registered(registry: Any, name: Any, where: str) -> Any:
    """The class or function of this name in one of BasicSR's registries."""
    for candidate in (name, f'{name}_basicsr'):
        if isinstance(name, str) and candidate in registry:
            return registry.get(candidate)
    raise OptionError(where, f'unknown type {shown(name)}; accepted: {", ".join(sorted(registry.keys()))}')


def find_type(registry: Any, block: Any, where: str) -> Any:
    """The class or function that a block's `type` names."""
    if not isinstance(block, Mapping) or 'type' not in block:
        raise OptionError(where, "expected a block of options with a key 'type'")
    return find_registered(registry, block['type'], f'{where}.type')


def check_arguments(target: Any,
                    block: Mapping[str, Any],
                    where: str,
                    given: Iterable[str] = (),
                    taken: Iterable[str] = ()) -> None:
    """Compares a block's keys with the arguments of what it builds.

    Args:
        target: Class or function to be called with the block's values.
        block: Option block; its ``type`` is left out.
        where: The block's place, for messages.
        given: Arguments that the caller adds where the block has none.
        taken: Arguments that the caller gives, so that the block may not.
    """
    parameters = [value for name, value in inspect.signature(target).parameters.items() if name not in taken]
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    required = {parameter.name for parameter in named if parameter.default is parameter.empty} - set(given)
    arguments = {key: value for key, value in block.items() if key != 'type'}
    accepted = {parameter.name for parameter in named} | (set(arguments) if len(named) < len(parameters) else set())
    check_keys(arguments, accepted, where, sorted(required))


def of_basicsr_or_ours(target: Any) -> bool:
    """Whether a class or function is known here, so that its arguments may be judged by their names."""
    return (inspect.getmodule(target) or inspect).__name__.split('.')[0] in ('basicsr', __name__.split('.')[0])


def check_argument(value: Any, default: Any, where: str, exact: bool) -> None:
    """Refuses a network's argument of another kind than its default, and numbers that no network has.

    Args:
        value: What the block says.
        default: The constructor's; `Parameter.empty` if it has none.
        where: The argument's place, for messages. Its last part is its name.
        exact: Whether an integer as default means that the argument is one; in the networks of others it may not.
    """
    name, required = where.rsplit('.', 1)[-1], default is inspect.Parameter.empty
    counted = name.startswith('num_') or name.endswith('_channels')
    if not exact and isinstance(value, (tuple, list)) and (required or default is None):
        return  # of stages, in networks of others
    if name in ('upscale', 'scale'):
        check_number(value, where, 1, MAX_SCALE, integer=exact)
    elif isinstance(default, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) > MAX_DEPTH:
            raise OptionError(where, f'expected a list of numbers such as {list(default)}, but got {shown(value)}')
        integer = all(isinstance(item, int) for item in default)
        for i, item in enumerate(value):
            check_number(item, f'{where}[{i}]', int(integer) or -MAX_NUMBER, MAX_NUMBER, integer=integer)
    elif name in DEPTHS and default is not None:
        check_number(value, where, 0, MAX_DEPTH, integer=True)
    elif name.endswith('_path') and value is not None:
        check_path(value, where)
    elif isinstance(default, bool) or (required and name.startswith('with_')):
        check_flag(value, where)
    elif isinstance(default, str) or (required and name.endswith('_type')):
        if not isinstance(value, str) and not (default == '' and value is None):
            raise OptionError(where, f'expected a word, but got {shown(value)}')
    elif isinstance(default, (int, float)) or counted:
        integer = counted or (exact and isinstance(default, int) and name not in FRACTIONS)
        most = MAX_NUMBER if exact or integer else sys.float_info.max
        check_number(value, where, int(counted) or -most, most, integer=integer)
    elif isinstance(default, type) and not required:
        raise OptionError(where, 'takes a class, which an option file cannot name; leave it out')
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = MAX_NUMBER if exact else sys.float_info.max
        check_number(value, where, -most, most)
    elif isinstance(value, Mapping) and exact:
        raise OptionError(where, f'expected a value or a list, but got {shown(value)}')


def upscales(target: Any) -> bool:
    """Whether a network's constructor takes a scale, as those of all networks for super-resolution do."""
    return not {'upscale', 'scale'}.isdisjoint(inspect.signature(target).parameters)


def check_network(block: Any, where: str) -> None:
    """Checks a network block and the networks inside it against their constructors, without building anything.

    Kinds of values follow from the constructors' defaults. Numbers have to be plausible: scales of 1 to MAX_SCALE,
    depths of at most MAX_DEPTH, also multiplied, others of at most MAX_NUMBER. The networks that `branches` and
    `backbone` name must be ones that upscale, a `classifier` one that classifies.

    Raises:
        OptionError: For the first mistake found.
    """
    from basicsr.utils.registry import ARCH_REGISTRY
    target = find_type(ARCH_REGISTRY, block, where)
    parameters, inner = inspect.signature(target).parameters, re.sub(r'\[\d+\]$', '', where).rsplit('.', 1)[-1]
    if inner in ('branches', 'backbone') and not upscales(target):
        raise OptionError(f'{where}.type', f'{block["type"]} is not a network that upscales')
    if inner == 'classifier' and 'num_classes' not in parameters:
        raise OptionError(f'{where}.type', f'{block["type"]} is not a classifier: it takes no num_classes')
    if target.__name__ == 'VGGFeatureExtractor':  # and its constructor starts a download
        raise OptionError(f'{where}.type', f'{block["type"]} computes features for losses, not images')
    check_arguments(target, block, where, ('num_classes', ) if inner == 'classifier' else ())
    depth = 1
    if block['type'] == 'SwinIR':
        check_windows(block, where)
    for key, value in block.items():
        place = f'{where}.{key}'
        default = parameters[key].default if key in parameters else inspect.Parameter.empty
        if key == 'branches':
            if not isinstance(value, list) or not 2 <= len(value) <= 5:
                raise OptionError(place, f'expected a list of 2 to 5 branches, but got {shown(value)}')
            for index, item in enumerate(value):
                if not isinstance(item, Mapping):
                    raise OptionError(f'{place}[{index}]', f'expected a block with a type, but got {shown(item)}')
                check_network(item, f'{place}[{index}]')
        elif default is inspect.Parameter.empty and key in ('classifier', 'backbone'):
            check_network(value, place)
        elif isinstance(value, Mapping) and 'type' in value:
            check_network(value, place)
        elif key != 'type':
            check_argument(value, default, place, of_basicsr_or_ours(target) and 'backbone' not in parameters)
            items = value if isinstance(value, (tuple, list)) else [value]
            if key in DEPTHS and all(isinstance(item, int) for item in items):
                depth *= max(1, sum(items))
    if depth > MAX_DEPTH:
        raise OptionError(where, f'would be {depth} blocks deep; at most {MAX_DEPTH} are accepted')


def check_windows(block: Mapping[str, Any], where: str) -> None:
    """Refuses a SwinIR that BasicSR cannot build: its defaults, 64 and 7, do not fit together."""
    size, window = block.get('img_size', 64), block.get('window_size', 7)
    check_number(window, f'{where}.window_size', 1, integer=True)
    for side in size if isinstance(size, (list, tuple)) else [size]:
        check_number(side, f'{where}.img_size', 1, integer=True)
        if side > window and side % window:
            raise OptionError(
                f'{where}.img_size', f'expected a multiple of window_size, {window}, such as '
                f'{side // window * window}, but got {size}')


@contextlib.contextmanager
def bounded_size(where: str) -> Iterator[None]:
    """Refuses a network while it is being built, as soon as it has more than MAX_LAYERS layers or MAX_WEIGHTS weights.

    It counts before weights are initialised, which is when their memory is first touched.
    """
    from torch.nn.modules import module
    layers = weights = 0

    def count_layer(parent: Any, name: str, layer: Any) -> None:
        nonlocal layers
        layers += 1
        if layers > MAX_LAYERS:
            raise OptionError(where, f'has more than {MAX_LAYERS} layers')

    def count_weights(parent: Any, name: str, weight: Any) -> None:
        nonlocal weights
        weights += weight.numel() if weight is not None else 0
        if weights > MAX_WEIGHTS:
            raise OptionError(where, f'has more than {MAX_WEIGHTS} weights')

    hooks = [
        module.register_module_module_registration_hook(count_layer),
        module.register_module_parameter_registration_hook(count_weights)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def built_network(block: Any, where: str) -> Any:
    """Builds a network, of plausible size, from its checked block.

    Raises:
        OptionError: Its values do not go together, or it is too large.
    """
    from basicsr.archs import build_network
    check_network(block, where)
    try:
        with bounded_size(where):
            return build_network(block)
    except OptionError:
        raise
    except Exception as error:  # wrong arguments of networks show in errors of any type
        if isinstance(error, MemoryError) or 'allocate memory' in str(error):
            raise OptionError(where, 'is larger than the memory') from error
        raise OptionError(where, f'does not make a network: {type(error).__name__}: {one_line(error)}') from error
