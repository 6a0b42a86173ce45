"""Describes the environment for bug reports. What cannot be imported is named, and the rest is still described."""
from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from . import __version__, _compat, plugins
from .machine import cache_folder, cpu_model, speed_file
from .zoo import PRETRAINED, SHIPPED

# distributions, and the modules that they bring
NEEDED = {
    'basicsr': 'basicsr',
    'torch': 'torch',
    'torchvision': 'torchvision',
    'numpy': 'numpy',
    'opencv-python': 'cv2',
    'pillow': 'PIL'
}
OPTIONAL = {
    'gradio': 'gradio',
    'spandrel': 'spandrel',
    'onnx': 'onnx',
    'onnxruntime': 'onnxruntime',
    'openvino': 'openvino',
    'pillow-heif': 'pillow_heif',
    'pillow-jxl-plugin': 'pillow_jxl'
}


class Environment:
    """What there is, and what of it fails.

    Attributes:
        versions: Version of each package; None if it is not installed, or cannot be imported.
        failed: What cannot be imported or loaded, and why.
    """

    def __init__(self) -> None:
        self.versions: dict[str, Optional[str]] = {'cdnsr_basicsr': __version__, 'python': platform.python_version()}
        self.failed: list[tuple[str, str]] = []

    def import_package(self, name: str, module: str, needed: bool = True) -> Any:
        """Imports a module, and notes the version of its package; None if it cannot be imported."""
        self.versions[name] = None
        try:
            imported = importlib.import_module(module)
            # the module's own word first: opencv-python has other names too
            self.versions[name] = str(getattr(imported, '__version__', None) or metadata.version(name))
            return imported
        except Exception as error:  # of a broken one there is no common type
            if needed or not (isinstance(error, ModuleNotFoundError) and error.name == module):
                self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        self.failed.append((name, ' '.join(f'{type(error).__name__}: {error}'.split())))

    def torch_content(self) -> dict[str, Any]:
        """What torch knows of the machine; empty if it cannot be imported."""
        content: dict[str, Any] = dict(threads=None, cuda=None, gpus=[])
        torch = self.import_package('torch', 'torch')
        try:
            if torch is not None:
                content.update(threads=torch.get_num_threads(), cuda=torch.version.cuda)
                if torch.cuda.is_available():
                    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
                    content['gpus'] = [dict(name=gpu.name, memory_mib=gpu.total_memory // 2**20) for gpu in gpus]
        except Exception as error:  # of a driver that does not fit, or half of a torch
            self.fail('torch', error)
        return content

    def device(self) -> str:
        """Version of torch, and the default device of the commands."""
        content = self.torch_content()
        if self.versions['torch'] is None:
            return f'torch cannot be imported: {self.failed[-1][1]}'
        cpu = f'cpu ({cpu_model()}, {content["threads"]} threads)'
        device = f'cuda ({content["gpus"][0]["name"]})' if content['gpus'] else cpu
        return f'torch {self.versions["torch"]} on {device}'

    def load_plugins(self) -> dict[str, str]:
        """Loads all plugins; the entry point of each by its name."""
        points = plugins()
        for point in points:
            try:
                _compat.patch_basicsr()
                point.load()()
            except Exception as error:
                self.fail(f'plugin {point.name}', error)
        return {point.name: point.value for point in points}

    def content(self) -> dict[str, Any]:
        """All of it, as values for JSON."""
        of_torch = self.torch_content()
        for packages in (NEEDED, OPTIONAL):
            for name, module in packages.items():
                if name != 'torch':
                    self.import_package(name, module, packages is NEEDED)
        versions = {name: self.versions[name] for name in ('cdnsr_basicsr', 'python', *NEEDED, *OPTIONAL)}
        loaded = self.load_plugins()
        return dict(
            versions=versions,
            system=platform.platform(),
            cpu=dict(model=cpu_model(), cpus=len(os.sched_getaffinity(0)), threads=of_torch['threads']),
            cuda=of_torch['cuda'],
            gpus=of_torch['gpus'],
            plugins=loaded,
            paths=dict(
                shipped_models=str(SHIPPED),
                own_models=str(Path.cwd() / PRETRAINED),
                cache=str(cache_folder()),
                speeds=str(speed_file())),
            failed=[dict(name=name, reason=reason) for name, reason in self.failed])


def summary() -> str:
    """A line for the package, one for torch and its device, one for the plugins, which are not loaded."""
    named = ', '.join(point.name for point in plugins()) or 'none'
    return f'cdnsr_basicsr {__version__}\n{Environment().device()}\nplugins: {named}\n'


def describe(content: dict[str, Any]) -> str:
    """The content of an Environment as text."""
    failed = {failure['name'] for failure in content['failed']}
    rows = []
    for name, version in content['versions'].items():
        rows.append((name, version or ('cannot be imported' if name in failed else 'not installed')))
    cpu, threads = content['cpu'], content['cpu']['threads']
    rows += [('system', content['system']),
             ('CPU', f'{cpu["model"]}, {cpu["cpus"]} usable' + (f', {threads} threads of torch' if threads else '')),
             ('CUDA', content['cuda'] or 'none')]
    rows += [(f'GPU {i}', f'{gpu["name"]}, {gpu["memory_mib"]} MiB') for i, gpu in enumerate(content['gpus'])]
    rows += [(f'plugin {name}', value) for name, value in content['plugins'].items()]
    for name, path in content['paths'].items():
        rows.append((name.replace('_', ' '), path if os.path.exists(path) else f'{path} (does not exist)'))
    width = max(len(name) for name, _ in rows)
    return ''.join(f'{name.ljust(width)}  {value}\n' for name, value in rows)
