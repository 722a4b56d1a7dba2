"""A graph loaded by its runtime, as a function from arrays to arrays."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress.errors import LmcompressError
from lmcompress.export.causal import PRESENT
from lmcompress.export.graph import ONNX_FILE, OPENVINO_FILE
from lmcompress.export.optional import library
from lmcompress.export.saturation import saturates
from lmcompress.export.stateful import BEAM_INDEX

RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""The runtimes, as they are called."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Session(ABC):
    """A loaded graph.

    Attributes:
        runtime: its name, ``"onnx"`` or ``"openvino"``.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        shapes: the shape of each of them by name; None where any size will do.
    """

    runtime: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, tuple[int | None, ...]]

    @abstractmethod
    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """The outputs by name.

        Args:
            arrays: all inputs by name.

        Raises:
            LmcompressError: If the runtime cannot compute them from these arrays.
        """

    @abstractmethod
    def run_into(self, arrays: Mapping[str, np.ndarray[Any, Any]], outputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write outputs into given memory, without copies.

        Args:
            arrays: all inputs by name, contiguous.
            outputs: contiguous arrays of the outputs' shapes, by name; those not named are not returned.

        Raises:
            LmcompressError: If the runtime cannot compute them from these arrays.
        """


@contextmanager
def one_error(session: Session, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[None]:
    """Within the block, what a runtime raises is one error, which names what the graph reads.

    Args:
        session: the loaded graph.
        arrays: its inputs by name; those with another number of axes are refused, as OpenVINO computes something.

    Yields:
        Nothing.

    Raises:
        LmcompressError: If the runtime fails, or an input has another number of axes.
    """
    try:
        for name, array in arrays.items():
            if (sizes := session.shapes.get(name)) is not None and len(sizes) != array.ndim:
                raise TypeError(f"{name} has the shape {array.shape}")
        yield
    except (LmcompressError, MemoryError):
        raise
    except Exception as error:
        said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        reads = ", ".join(f"{name} {_shape(session.shapes.get(name))}" for name in session.inputs)
        raise LmcompressError(
            f"{RUNTIMES[session.runtime]} cannot compute the graph from these inputs ({type(error).__name__}: "
            f"{said[:400]}); it reads {reads}"
        ) from error


def _shape(sizes: tuple[int | None, ...] | None) -> str:
    return "" if sizes is None else f"({', '.join('any' if size is None else str(size) for size in sizes)})"


class OnnxSession(Session):
    """A graph in ONNX Runtime, on the CPU.

    Args:
        file: the ``.onnx``.
        threads: number of threads; None: the runtime's choice.
        optimized: where to write the optimized graph, if anywhere.
    """

    runtime = "onnx"

    def __init__(self, file: Path, threads: int | None = None, optimized: Path | None = None) -> None:
        ort = library("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        # idle threads would take the processor from whoever runs next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # without VNNI, products of unsigned and signed bytes are added up in 16 bits, which saturate; it multiplies
        # unsigned ones there, and changes nothing on other processors
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise LmcompressError(
                f"ONNX Runtime {ort.__version__} cannot load {file.name}: {str(error).splitlines()[0][:400]}"
            ) from error
        self.inputs = tuple(one.name for one in self._session.get_inputs())
        self.outputs = tuple(one.name for one in self._session.get_outputs())
        self.shapes = {
            one.name: tuple(size if isinstance(size, int) else None for size in one.shape)
            for one in (*self._session.get_inputs(), *self._session.get_outputs())
        }

    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """The outputs by name.

        Args:
            arrays: all inputs by name.
        """
        with one_error(self, arrays):
            found = self._session.run(None, {name: arrays[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))

    def run_into(self, arrays: Mapping[str, np.ndarray[Any, Any]], outputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write outputs into given memory, without copies.

        Args:
            arrays: all inputs by name, contiguous.
            outputs: contiguous arrays of the outputs' shapes, by name; those not named are not returned.
        """
        with one_error(self, arrays):
            binding = self._session.io_binding()
            for name in self.inputs:
                binding.bind_cpu_input(name, arrays[name])
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)


class OpenVinoSession(Session):
    """A graph in OpenVINO, on the CPU.

    On a processor on which products of bytes saturate, codes are multiplied as floats: exact, and slower.

    Args:
        file: the ``.xml``.
        threads: number of threads; None: the runtime's choice.
        precision: of what is not quantized: ``"f32"``, ``"bf16"`` or ``"f16"``; None: the runtime's choice.
        saturating: whether to multiply bytes even there, as programs do that know nothing of it.
    """

    runtime = "openvino"

    def __init__(
        self, file: Path, threads: int | None = None, precision: str | None = None, *, saturating: bool = False
    ) -> None:
        openvino = library("openvino", "openvino")
        settings: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        if not saturating and saturates():
            settings["LP_TRANSFORMS_MODE"] = False
        core = openvino.Core()
        try:
            self._model = core.compile_model(core.read_model(str(file)), "CPU", settings)
        except RuntimeError as error:
            raise LmcompressError(
                f"OpenVINO {openvino.__version__} cannot load {file.name}: {str(error).splitlines()[-1][:400]}"
            ) from error
        self._request = self._model.create_infer_request()
        # inputs and outputs of a call lie in the request
        self._calls = threading.Lock()
        self.inputs = tuple(one.get_any_name() for one in self._model.inputs)
        self.outputs = tuple(one.get_any_name() for one in self._model.outputs)
        self.shapes = {
            one.get_any_name(): tuple(size.get_length() if size.is_static else None for size in one.partial_shape)
            for one in (*self._model.inputs, *self._model.outputs)
        }

    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """The outputs by name.

        Args:
            arrays: all inputs by name.
        """
        with self._calls, one_error(self, arrays):
            self._request.infer({name: arrays[name] for name in self.inputs})
            # copies: the next call writes into the same memory
            found = [np.array(self._request.get_output_tensor(i).data) for i in range(len(self.outputs))]
        return dict(zip(self.outputs, found, strict=True))

    def run_into(self, arrays: Mapping[str, np.ndarray[Any, Any]], outputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write outputs into given memory, without copies.

        Args:
            arrays: all inputs by name, contiguous.
            outputs: contiguous arrays of the outputs' shapes, by name; those not named are not returned.
        """
        tensor = library("openvino", "openvino").Tensor
        with one_error(self, arrays):
            request = self._model.create_infer_request()
            for name in self.inputs:
                request.set_tensor(name, tensor(arrays[name], shared_memory=True))
            for name, array in outputs.items():
                request.set_tensor(name, tensor(array, shared_memory=True))
            request.infer()

    def products(self) -> Counter[tuple[str, str]]:
        """How often each type of matmul runs in each precision: ``("FullyConnected", "i8")`` to a number."""
        found: Counter[tuple[str, str]] = Counter()
        for node in self._model.get_runtime_model().get_ordered_ops():
            info = {name: str(value.value) for name, value in node.get_rt_info().items()}
            found[info.get("layerType", ""), info.get("runtimePrecision", "")] += 1
        return found


class StatefulSession(OpenVinoSession):
    """A causal model in OpenVINO whose keys and values stay in the runtime.

    It is called like one with past keys and values as inputs and outputs; :meth:`request` is what saves their copies.

    Args:
        file: the ``.xml``.
        threads: number of threads; None: the runtime's choice.
        precision: of what is not quantized: ``"f32"``, ``"bf16"`` or ``"f16"``; None: the runtime's choice.
    """

    def __init__(self, file: Path, threads: int | None = None, precision: str | None = None) -> None:
        super().__init__(file, threads, precision)
        self._names = {state.name: _names_of(state.name) for state in self._request.query_state()}
        self.fed = tuple(name for name in self.inputs if name != BEAM_INDEX)
        self.inputs = (*self.fed, *(given for given, _ in self._names.values()))
        self.outputs = (*self.outputs, *(kept for _, kept in self._names.values()))

    def request(self) -> Any:
        """A request of the runtime, with states of its own that are empty."""
        return self._model.create_infer_request()

    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """The outputs by name.

        Args:
            arrays: all inputs by name.
        """
        with self._calls, one_error(self, arrays):
            return self._computed(arrays)

    def _computed(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        tensor, states = library("openvino", "openvino").Tensor, self._request.query_state()
        self._request.reset_state()
        for state in states:
            given = arrays[self._names[state.name][0]]
            if given.size:
                state.state = tensor(given)
        rows = len(arrays["input_ids"])
        self._request.infer({name: arrays[name] for name in self.fed} | {BEAM_INDEX: np.arange(rows, dtype=np.int32)})
        kept = {self._names[state.name][1]: np.array(state.state.data) for state in states}
        return {"logits": np.array(self._request.get_tensor("logits").data)} | kept

    def run_into(self, arrays: Mapping[str, np.ndarray[Any, Any]], outputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write outputs into given memory.

        Args:
            arrays: all inputs by name.
            outputs: arrays of the outputs' shapes, by name.
        """
        found = self.run(arrays)
        for name, array in outputs.items():
            array[...] = found[name]


def _names_of(state: str) -> tuple[str, str]:
    """Names of the input and of the output that OpenVINO has made a state of, which it joins to the state's name."""
    given, _, kept = state.partition(PRESENT)
    return given, PRESENT + kept


def session_of(folder: Path, threads: int | None = None, precision: str | None = None) -> Session:
    """The graph of an exported folder, loaded by its runtime.

    Args:
        folder: the folder.
        threads: number of threads; None: the runtime's choice.
        precision: of what is not quantized; for OpenVINO only.

    Raises:
        LmcompressError: If there is no graph, its runtime is not installed or cannot load it, or a precision is given
            for ONNX Runtime.
    """
    if (folder / ONNX_FILE).is_file():
        if precision is not None:
            raise LmcompressError(
                f"precision is for OpenVINO; ONNX Runtime computes as the graph says, got {precision!r}"
            )
        return OnnxSession(folder / ONNX_FILE, threads)
    if (folder / OPENVINO_FILE).is_file():
        kind = StatefulSession if _has_states(folder / OPENVINO_FILE) else OpenVinoSession
        return kind(folder / OPENVINO_FILE, threads, precision)
    raise LmcompressError(f"{folder} is no exported model: it has neither {ONNX_FILE} nor {OPENVINO_FILE}")


def _has_states(file: Path) -> bool:
    # the graph alone is read, which is small; a compiler would take seconds
    return f'"{BEAM_INDEX}"' in file.read_text(encoding="utf-8")
