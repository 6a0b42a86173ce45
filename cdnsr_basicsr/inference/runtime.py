"""Exported networks that ONNX Runtime or OpenVINO runs on the CPU, for the engine."""
from __future__ import annotations

import functools
import importlib
import importlib.util
import torch
from collections import Counter
from torch import nn
from typing import Any, Optional

from ..settings import PRECISIONS

BACKENDS = {'openvino': 'openvino', 'onnxruntime': 'onnx'}  # the faster one first; the extras that bring them
OFTEN, MOST_SIZES = 32, 8  # OpenVINO: uses after which a size is compiled for, and how many are kept
MOST_KERNELS = 64  # that OpenVINO keeps for tiles of other sizes; it would keep 5000, and grow with every new image


def installed() -> list[str]:
    """The backends, besides torch, that can be used here; the faster one first."""
    return [name for name in BACKENDS if importlib.util.find_spec(name)]


def precisions(backend: str) -> tuple[str, ...]:
    """The precisions that a backend supports on this machine."""
    if backend == 'torch':
        return PRECISIONS
    if backend == 'openvino':  # what a CPU cannot do, it would do in float32 without a word
        if 'BF16' in openvino_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            return ('float32', 'bfloat16')
    return ('float32', )


@functools.cache
def openvino_core() -> Any:
    """OpenVINO itself, once in the process.

    Each Core changes the stack that signals are handled on, and changes it back when it ends. If the first of two ends
    first, that stack does not exist any more, and the next signal (Ctrl+C, the end of a data loader's worker) crashes
    the process.
    """
    import openvino
    return openvino.Core()


class OnnxRuntime:
    """An ONNX model in ONNX Runtime.

    Args:
        model: Content of the ONNX file.
    """

    def __init__(self, model: bytes) -> None:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, not written
        self.session = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])

    def __call__(self, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if dtype != torch.float32:
            raise ValueError(f'ONNX Runtime computes in float32, not in {dtype}')
        name = self.session.get_inputs()[0].name
        return torch.from_numpy(self.session.run(None, {name: x.contiguous().numpy()})[0])


class OpenVino:
    """An ONNX model in OpenVINO.

    It is compiled for each precision when that is first asked for, for tiles of any size; and for tiles of one size
    when these have come often, which makes it faster by 4 to 12 %, but takes 0.1 s.

    Images go in and out channels last, as the engine has them and OpenVINO computes: nothing is copied.

    Args:
        model: Content of the ONNX file.
    """

    def __init__(self, model: bytes) -> None:
        import openvino
        from openvino.preprocess import PrePostProcessor
        read = openvino_core().read_model(model)
        layouts = PrePostProcessor(read)
        ends = [layouts.input()] + [layouts.output()] * (read.output().partial_shape.rank.get_length() == 4)
        for end in ends:
            end.model().set_layout(openvino.Layout('NCHW'))
            end.tensor().set_layout(openvino.Layout('NHWC'))
        self.model = layouts.build()
        self.requests: dict[tuple[Any, ...], Any] = {}  # by precision, and by precision and shape; the latest used last
        self.uses: Counter[tuple[Any, ...]] = Counter()
        self.is_checked = False  # whether outputs are as large as expected

    def _request(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """The inference request for inputs of this shape (b, h, w, c)."""
        self.uses[dtype, shape] += 1
        key = (dtype, shape) if self.uses[dtype, shape] > OFTEN else (dtype, )
        if key not in self.requests:
            model, precision = self.model, {torch.float32: 'f32', torch.bfloat16: 'bf16'}[dtype]
            if len(key) == 2:
                model = model.clone()
                model.reshape(list(shape))
            compiled = openvino_core().compile_model(
                model, 'CPU',
                dict(
                    PERFORMANCE_HINT='LATENCY',
                    INFERENCE_PRECISION_HINT=precision,
                    CPU_RUNTIME_CACHE_CAPACITY=MOST_KERNELS,
                    INFERENCE_NUM_THREADS=torch.get_num_threads()))
            self.requests[key] = compiled.create_infer_request()
            sizes = [known for known in self.requests if len(known) == 2]
            for known in sizes[:-MOST_SIZES]:  # each has weights of its own
                del self.requests[known], self.uses[known]
        self.requests[key] = self.requests.pop(key)
        return self.requests[key]

    def __call__(self, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        import openvino
        x = x.permute(0, 2, 3, 1).contiguous()
        request = self._request(dtype, tuple(x.shape))
        images = len(shape) == 4
        output = torch.empty([shape[0], *shape[2:], shape[1]] if images else shape)
        if self.is_checked:  # a tensor that is too small would not be refused, but corrupt memory
            request.set_output_tensor(openvino.Tensor(output.numpy(), shared_memory=True))
        request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)
        made = request.get_output_tensor()
        if tuple(made.shape) != tuple(output.shape):
            raise ValueError(f'expected an output of {tuple(output.shape)}, but got {tuple(made.shape)}')
        if not self.is_checked:
            output.copy_(torch.from_numpy(made.data))
            self.is_checked = True
        return output.permute(0, 3, 1, 2) if images else output


class ExportedPart(nn.Module):
    """A classifier or a branch that another runtime computes, in the precision of torch.autocast.

    Args:
        model: Content of the ONNX file.
        backend: 'openvino' | 'onnxruntime'.
        name: What it is called in messages and, together with the backend, in measurements.
        macs: Its multiply-accumulates for one pixel of the input.
        channels: Of the images.
        scale: Upsampling factor; of a branch.
        multiple: What the sides of images must be multiples of.
        num_classes: Of a classifier.
        arch: Whose weights it holds, as far as that is known.

    Raises:
        ValueError: The backend cannot read the model.
    """

    def __init__(self,
                 model: bytes,
                 backend: str,
                 name: str,
                 macs: float,
                 channels: int,
                 scale: int = 1,
                 multiple: int = 1,
                 num_classes: Optional[int] = None,
                 arch: Optional[str] = None) -> None:
        super().__init__()
        version = importlib.import_module(backend).__version__
        self.description = f'{name}, {backend} {version}'
        self.name, self.macs_per_pixel, self.num_classes = name, macs, num_classes
        self.known_geometry, self.known_arch = (scale, channels, multiple), arch
        try:
            self.run = (OnnxRuntime if backend == 'onnxruntime' else OpenVino)(model)
        except Exception as error:  # ONNX Runtime's errors have no common type
            raise ValueError(f'{name}: {backend} cannot read it: {_last_line(error)}') from error

    def exported_macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for an input of this size."""
        return round(self.macs_per_pixel * height * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: of shape (b, c, h, w), in [0, 1], float32, on the CPU.

        Returns:
            Images of shape (b, c, h * scale, w * scale), or logits of shape (b, num_classes), float32.

        Raises:
            RuntimeError: The model's output has another shape.
        """
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32
        scale, channels, _ = self.known_geometry
        b, _, h, w = x.shape
        shape = (b, channels, h * scale, w * scale) if self.num_classes is None else (b, self.num_classes)
        try:
            output = self.run(x, dtype, shape)
        except Exception as error:
            raise RuntimeError(f'{self.name}: {_last_line(error)}') from error
        if output.shape != shape:
            raise RuntimeError(f'{self.name} makes {tuple(output.shape)} from {tuple(x.shape)}, expected {shape}')
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedPart:
        return self  # it never changes

    def extra_repr(self) -> str:
        return self.description


class ExportedErrorPredictor(ExportedPart):
    """A classifier that predicts errors; see ErrorPredictor.

    Args:
        price: See there.
        costs: Of the branches, as its logits count them.
        margin, reference: See ErrorMap.
    """

    def __init__(self,
                 *args: Any,
                 price: float,
                 costs: list[float],
                 margin: float = 1.,
                 reference: str = 'gt',
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.price, self.costs = price, torch.tensor(costs)
        self.margin, self.reference = margin, reference

    def errors(self, logits: torch.Tensor) -> torch.Tensor:
        """The predicted squared errors, in grey levels, that logits (b, M) stand for."""
        return -self.price * (logits + self.costs)


class ExportedNetwork(nn.Module):
    """A routed network of exported parts, as the engine takes it.

    Args:
        classifier: The classifier.
        branches: The branches, the cheapest first.
    """

    def __init__(self, classifier: ExportedPart, branches: list[ExportedPart]) -> None:
        super().__init__()
        self.classifier, self.branches = classifier, nn.ModuleList(branches)
        self.upscale = branches[0].known_geometry[0]


def _last_line(error: Exception) -> str:
    """The text of a runtime's error, without the places in its sources that OpenVINO's begin with."""
    lines = [' '.join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
