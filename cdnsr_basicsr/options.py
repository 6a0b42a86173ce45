"""Reading option files and refusing wrong ones with one clear line."""
from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import yaml
from typing import Any, Iterable, Iterator, Mapping, Optional

# what no network of use goes beyond; a mistake or a broken file does
MAX_SCALE = 16
MAX_DEPTH = 1000  # blocks, also those of all groups together
MAX_NUMBER = 2**16
MAX_LAYERS = 50000
MAX_WEIGHTS = 2**30
MAX_VALUES = 10**5  # of an option file
MAX_BYTES = 2**22
MAX_NAME = 150  # bytes; BasicSR puts more around it
# arguments that say how often something is repeated
DEPTHS = ('depths', 'num_block', 'num_blocks', 'num_group', 'num_map', 'num_conv', 'num_mlp', 'num_layer', 'num_d',
          'n_layers_d', 'num_extract_block', 'num_reconstruct_block')
# arguments of BasicSR's networks that are fractions, though their defaults are written as integers
FRACTIONS = ('res_scale', 'max_residue_magnitude', 'narrow')


class OptionError(ValueError):
    """A mistake in an option file, on the command line or in an argument.

    Args:
        key: Where: the option's path (``train.freeze``), a file, a command line flag, or an argument (``scale=0``).
        message: What is wrong and what is accepted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f'{key}: {message}')
        self.key, self.message = key, message


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that torchrun or Slurm has started."""
    return int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0


def one_line(error: BaseException) -> str:
    """What an error says, short and without line breaks."""
    return ' '.join(str(error).split())[:300]


def shown(value: Any) -> str:
    """A value as messages show it, in a line of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:100]} ...'


class OptionLoader(yaml.SafeLoader):
    """YAML loader that builds plain data only and reads ``2e-4`` as a number, as YAML 1.2 does.

    What a few lines of aliases could blow up to billions of values is refused before it is built.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self.values_in(node, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f'aliases make more than {MAX_VALUES} values of it',
                                                    node.start_mark)
        return node

    def values_in(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Values in a node once all its aliases are written out; `known` holds those of the nodes already counted."""
        if id(node) not in known:
            known[id(node)] = MAX_VALUES + 1  # one that holds itself is infinite
            items = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for item in items for part in (item if isinstance(item, tuple) else (item, ))]
            known[id(node)] = 1 + sum(self.values_in(part, known) for part in parts)
        return known[id(node)]

    def construct_mapping_once(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == 'tag:yaml.org,2002:merge':
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key {key!r} stands twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


OptionLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
                             lambda loader, node: loader.construct_mapping_once(node, deep=True))
OptionLoader.add_implicit_resolver('tag:yaml.org,2002:float', re.compile(r'^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$'),
                                   list('-+0123456789'))


def read_options(path: str) -> dict:
    """Reads an option file without running anything that stands in it.

    Args:
        path: YAML file.

    Raises:
        OptionError: The file is missing, is no YAML mapping, or holds a tag other than YAML's own (such as
            ``!!python/object/apply``, which BasicSR's loader would execute).
    """
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise OptionError(path, f'is larger than an option file can be, {MAX_BYTES >> 20} MiB')
        opt = yaml.load(text, Loader=OptionLoader)
    except OptionError:
        raise
    except FileNotFoundError:
        raise OptionError(path, 'no such option file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(path, f'cannot be read: {error}') from None
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else '?'
        raise OptionError(path,
                          f'line {line}: {error.problem}; accepted are plain values, lists and mappings') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(path, f'not valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(opt, dict):
        raise OptionError(path, f'expected a mapping of options, but got {type(opt).__name__}')
    return opt


def parse_force_yml(entry: str) -> tuple[list[str], Any]:
    """Splits one ``--force_yml`` entry, ``key:sub=value``, into its keys and its value.

    Raises:
        OptionError: The entry has another form. BasicSR pastes the keys into code that it executes.
    """
    match = re.fullmatch(r'\s*([A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)*)\s*=([^=]*)', entry)
    if match is None:
        raise OptionError(f'--force_yml {entry}', 'accepted is key:sub=value, for example train:ema_decay=0.999')
    return match.group(1).split(':'), force_yml_value(match.group(2).strip())


def force_yml_value(text: str) -> Any:
    """The value of a ``--force_yml`` entry: a YAML scalar or list; ``None``, ``True`` and ``False`` in any case."""
    if text.lower() == 'none':
        return None
    try:
        return yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError:
        raise OptionError(f'--force_yml ...={text}', 'the value is no YAML scalar or list') from None


def apply_force_yml(opt: dict, entries: Iterable[str]) -> None:
    """Sets ``--force_yml`` entries in ``opt``, in place. A last key may be new, the way to it must exist."""
    for entry in entries:
        keys, value = parse_force_yml(entry)
        block = opt
        for key in keys[:-1]:
            if not isinstance(block.get(key), dict):
                blocks = ', '.join(str(name) for name, sub in block.items() if isinstance(sub, dict))
                raise OptionError(f'--force_yml {entry}', f'{key!r} is no block of the option file; accepted: {blocks}')
            block = block[key]
        block[keys[-1]] = value


def check_keys(block: Any, accepted: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    """Refuses unknown and missing keys of one option block.

    Raises:
        OptionError: With the place, the key and what is accepted.
    """
    if not isinstance(block, Mapping):
        raise OptionError(where, f'expected a block of options, but got {shown(block)}')
    accepted = list(accepted)
    for key in block:
        if key not in accepted:
            raise OptionError(f'{where}.{key}', f'unknown key; accepted: {", ".join(sorted(accepted))}')
    for key in required:
        if key not in block:
            raise OptionError(where, f'key {key!r} is missing')


def check_number(value: Any, where: str, low: float, high: Optional[float] = None, integer: bool = False) -> None:
    """Refuses a value that is no finite number (an integer, if asked for) in [low, high]."""
    kinds = (int, ) if integer else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and low <= value < float('inf')
    if not fits or value == float('-inf') or (high is not None and value > high):
        span = f' at least {low}' if low > float('-inf') else ''
        span = span if high is None else f' from {low} to {high}'
        raise OptionError(where, f'expected {"an integer" if integer else "a number"}{span}, but got {shown(value)}')


def check_whole(value: Any, where: str, low: int, high: int) -> None:
    """Refuses a value that is no whole number in [low, high]; 5e3 is one."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or value != int(value):
        raise OptionError(where, f'expected a whole number from {low} to {high}, but got {shown(value)}')


def check_list(value: Any, where: str, *lengths: int) -> None:
    """Refuses a value that is no list, or an empty one, or, if asked for, one of other lengths."""
    if not isinstance(value, (list, tuple)) or len(value) not in (lengths or range(1, MAX_NUMBER)):
        count = f' of {" or ".join(map(str, lengths))} values' if lengths else ''
        raise OptionError(where, f'expected a list{count}, but got {shown(value)}')


def check_name(value: Any, where: str) -> None:
    """Refuses a value that could not name a folder of its own."""
    fits = isinstance(value, str) and 0 < len(os.fsencode(value)) <= MAX_NAME and value.isprintable()
    if not fits or value != value.strip() or set(value) & set('/\\') or value in ('.', '..'):
        raise OptionError(where, f'expected the name of a folder, but got {shown(value)}')


def check_choice(value: Any, where: str, accepted: Iterable[Any]) -> None:
    """Refuses a value that is none of those accepted."""
    accepted = list(accepted)
    if value not in accepted:
        raise OptionError(where, f'accepted: {", ".join(str(item) for item in accepted)}; got {shown(value)}')


def check_flag(value: Any, where: str) -> None:
    """Refuses a value that is neither true nor false; 'no', 0 and 1 are none of them."""
    if not isinstance(value, bool):
        raise OptionError(where, f'accepted: true, false; got {shown(value)}')


def check_routing(block: Any, where: str) -> None:
    """Refuses what does not say how PCSR routes pixels."""
    check_keys(block, ('k', 'adaptive', 'refinement', 'budget'), where)
    check_number(block.get('k', 0), f'{where}.k', float('-inf'))
    for key in ('adaptive', 'refinement'):
        check_flag(block.get(key, False), f'{where}.{key}')
    if block.get('budget') is not None:
        check_number(block['budget'], f'{where}.budget', 0)
        if block.get('k') or block.get('adaptive'):
            raise OptionError(f'{where}.budget', 'replaces k and adaptive; give one of them')


def read_routing(path: str) -> dict:
    """How an option file says that PCSR routes pixels; empty if it does not."""
    routing = read_options(path).get('routing')
    if routing:
        check_routing(routing, f'{path}: routing')
    return routing or {}


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


def check_arguments(target: Any, block: Mapping, where: str, given: Iterable[str] = (),
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
        raise OptionError(f'{where}.type', f'{block["type"]} is no network that upscales')
    if inner == 'classifier' and 'num_classes' not in parameters:
        raise OptionError(f'{where}.type', f'{block["type"]} is no classifier, which takes num_classes')
    if target.__name__ == 'VGGFeatureExtractor':  # and its constructor starts a download
        raise OptionError(f'{where}.type', f'{block["type"]} makes features for losses and no images')
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


def check_windows(block: Mapping, where: str) -> None:
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
        raise OptionError(where, f'makes no network: {type(error).__name__}: {one_line(error)}') from error


def check_path(value: Any, where: str) -> None:
    """Refuses a path that does not exist."""
    if not isinstance(value, str):
        raise OptionError(where, f'expected a path, but got {shown(value)}')
    if not os.path.exists(os.path.expanduser(value)):
        raise OptionError(where, f'no such file or folder: {value}')


def check_tested(opt: Mapping) -> None:
    """Refuses to test a network without weights."""
    if not opt['path'].get('pretrain_network_g'):
        raise OptionError('path.pretrain_network_g', 'is needed for a test: a checkpoint, or the name of a model')
