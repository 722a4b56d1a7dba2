"""Where an exported model begins to differ: the outputs of all layers, in the runtime and in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.export.check import difference
from lmcompress.export.config import ExportConfig
from lmcompress.export.graph import write_graph
from lmcompress.export.heads import Head
from lmcompress.export.runtime import array
from lmcompress.export.sessions import session_of
from lmcompress.kernels.dispatch import using

_SEPARATOR = "/"


class Traced(Head):
    """A head whose graph also has the outputs of the layers inside.

    Args:
        head: a head with an exportable model.
        paths: paths of the layers in its model.
    """

    # embeddings of positions have one row for all
    has_rows = False

    def __init__(self, head: Head, paths: list[str]) -> None:
        nn.Module.__init__(self)
        self.head, self.paths = head, paths
        self.inputs = head.inputs
        self.outputs = tuple(f"layer{_SEPARATOR}{path}" for path in paths)

    @property
    def model(self) -> nn.Module:
        """The model in the head."""
        return self.head.model

    def example(self) -> tuple[Tensor, ...]:
        """As the head's."""
        return self.head.example()

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """As the head's."""
        return self.head.dynamic_shapes()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the layers.

        Args:
            *tensors: in the order of :attr:`inputs`.
        """
        with _outputs(self.head.model, self.paths) as found:
            self.head(*tensors)
        return tuple(found[path] for path in self.paths)


def first_difference(
    packed: Head, exportable: Head, folder: Path, batch: Mapping[str, Tensor], config: ExportConfig, tolerance: float
) -> str | None:
    """The path of the first layer whose output differs in the runtime.

    Args:
        packed: with the packed model.
        exportable: with its exportable twin.
        folder: an empty folder for the graph that is compared.
        batch: one batch.
        config: the settings of the export.
        tolerance: relative error of a layer's output that counts.

    Returns:
        None if no layer differs by that much.
    """
    arguments = packed.arguments(batch)
    with torch.no_grad(), using(kernel="reference"), _outputs(packed.model, None) as wanted:
        packed(*arguments)
    known = dict(exportable.model.named_modules())
    traced = Traced(exportable, [path for path in wanted if path in known])
    # keys and values are inputs, and what becomes of them no output, of this graph
    write_graph(traced, folder, config.model_copy(update={"stateful": False}))
    session = session_of(folder, precision="f32" if config.to == "openvino" else None)
    found = session.run({name: array(x) for name, x in zip(packed.inputs, arguments, strict=True)})
    for path in traced.paths:
        got = torch.as_tensor(found[f"layer{_SEPARATOR}{path}"])
        # written this way round so that NaN differs
        if not difference(got, wanted[path], batch.get("attention_mask"))[1] <= tolerance:
            return path
    return None


@contextmanager
def _outputs(model: nn.Module, paths: list[str] | None) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers during a forward pass, in the order of their calls; None: of all innermost modules."""
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                found[path] = output

        return keep

    chosen = [
        (path, module)
        for path, module in model.named_modules()
        if (path in paths if paths is not None else not list(module.children()))
    ]
    handles = [module.register_forward_hook(hook(path)) for path, module in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
