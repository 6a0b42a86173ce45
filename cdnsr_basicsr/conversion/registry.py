"""Families of other projects' checkpoints: the files *_family.py beside this one.

No torch here and, before a checkpoint is loaded, in these files: the help text of `basicsr convert` needs their names.
"""
from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, NamedTuple

if TYPE_CHECKING:
    import torch

State = Dict[str, 'torch.Tensor']


class Source(NamedTuple):
    """A checkpoint of another project.

    Attributes:
        state: Its weights by name.
        content: All that the file holds.
    """
    state: State
    content: Mapping[str, Any] = {}


class Found(NamedTuple):
    """A network that was recognised in a checkpoint.

    Attributes:
        block: Its option block, as network_g.
        state: Its weights under the names of the arch in the block.
        notes: What a user should know of the conversion.
    """
    block: dict[str, Any]
    state: State
    notes: tuple[str, ...] = ()


class Family(ABC):
    """A family of checkpoints. Errors of `detect` and `load` are shown to users as errors of the file.

    Attributes:
        names: What `--from` calls it.
        projects: Whose files they are.
        files: Which of these files are read, as README says it.
        order: Families of lower numbers are tried first, those of one number by the names of their files.
    """
    names: tuple[str, ...]
    projects: str
    files: str
    order = 2

    @abstractmethod
    def detect(self, source: Source) -> bool:
        """Whether the names of the weights, or what else the file says, are those of this family."""

    @abstractmethod
    def load(self, source: Source, upscale: int) -> Found:
        """The network of a checkpoint that has been detected.

        Args:
            source: The checkpoint.
            upscale: Upsampling factor, for files that do not tell it or hold several.
        """


_registered: list[Family] = []


def register(family: type[Family]) -> type[Family]:
    """Enters a family into `families`."""
    taken = {name for known in _registered for name in known.names}.intersection(family.names)
    if taken:
        raise ValueError(f'{family.__name__}: a family of the name {min(taken)} already exists')
    _registered.append(family())
    return family


@functools.lru_cache(maxsize=None)
def families() -> dict[str, Family]:
    """All families by name, in the order in which they are tried."""
    for path in sorted(Path(__file__).parent.glob('*_family.py')):
        importlib.import_module(f'.{path.stem}', __package__)
    ordered = sorted(_registered, key=lambda family: (family.order, type(family).__module__))  # stable within a file
    return {name: family for family in ordered for name in family.names}


def names_of_families() -> str:
    """What `--from` accepts, for its help text."""
    *names, last = sorted(families())
    return f'{", ".join(names)} or {last}'
