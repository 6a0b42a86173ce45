"""Checkpoints of other projects: one module per family, each a table of names."""
from __future__ import annotations

import re
import torch
from torch import nn
from typing import Optional, Sequence

Table = Sequence[tuple[str, Optional[str]]]


def rename(state: dict[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """Renames weights.

    Args:
        state: Weights by name.
        table: Patterns and new names; the first pattern that fits counts. <n> in a new name stands for n - 1, and None
            leaves a weight out. What fits none keeps its name.
    """
    renamed = {}
    for key, value in state.items():
        for pattern, new in table:
            if re.match(pattern, key):
                if new is not None:
                    name = re.sub(pattern, new, key)
                    renamed[re.sub(r'<(\d)>', lambda match: str(int(match.group(1)) - 1), name)] = value
                break
        else:
            renamed[key] = value
    return renamed


def slice_to(state: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
    """The first channels of a slimmable network's weights, as many as `net` has."""
    return {key: state[key][tuple(slice(0, size) for size in target.shape)] for key, target in net.state_dict().items()}
