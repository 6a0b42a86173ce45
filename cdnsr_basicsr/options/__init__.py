"""Option files: reading them, what they may hold, and refusing wrong ones with one clear line."""
from .networks import built_network, check_network, find_registered, find_type
from .reading import OptionLoader, force_yml_value, is_first_process, parse_force_yml, read_options, resolve_options
from .schema import check_routing, read_routing
from .values import OptionError, check_choice, check_keys, check_number, check_path, one_line, shown

__all__ = [
    'OptionError', 'OptionLoader', 'built_network', 'check_choice', 'check_keys', 'check_network', 'check_number',
    'check_path', 'check_routing', 'find_registered', 'find_type', 'force_yml_value', 'is_first_process', 'one_line',
    'parse_force_yml', 'read_options', 'read_routing', 'resolve_options', 'shown'
]
