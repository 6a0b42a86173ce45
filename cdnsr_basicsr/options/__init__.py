"""Option files: reading them, what they may hold, and refusing wrong ones with one clear line."""
from .networks import built_network, check_arguments, check_network, find_registered, find_type, of_basicsr_or_ours
from .reading import (
    OptionLoader,
    apply_force_yml,
    force_yml_value,
    is_first_process,
    parse_force_yml,
    read_options,
    resolve_options,
)
from .schema import check_routing, read_routing
from .values import (
    OptionError,
    check_choice,
    check_flag,
    check_keys,
    check_list,
    check_name,
    check_number,
    check_path,
    check_whole,
    one_line,
    shown,
)

__all__ = [
    'OptionError', 'OptionLoader', 'apply_force_yml', 'built_network', 'check_arguments', 'check_choice', 'check_flag',
    'check_keys', 'check_list', 'check_name', 'check_network', 'check_number', 'check_path', 'check_routing',
    'check_whole', 'find_registered', 'find_type', 'force_yml_value', 'is_first_process', 'of_basicsr_or_ours',
    'one_line', 'parse_force_yml', 'read_options', 'read_routing', 'resolve_options', 'shown'
]
