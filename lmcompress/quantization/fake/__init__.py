"""A model that computes with quantized numbers while its weights keep full precision, for training or packing.

**Weights.** The class of a quantized module becomes one whose ``weight`` is a property: every reader, the
module's own ``forward`` or a loss over the vocabulary, gets quantized values with a gradient to the parameter, which
stays in place under its own name. So tied matrices stay tied and are quantized once, and training checkpoints
are ordinary ones of the full-precision weights. (``torch.nn.utils.parametrize`` would rename every tensor.)

**Activations.** Inputs of matmuls by forward pre-hooks; within attention by
:mod:`lmcompress.nn.quantized_attention`.

Learned states, γ, clips and steps, belong to no module of the model: they are in :attr:`FakeQuantized.state`, for
a separate learning rate.
"""

from lmcompress.quantization.fake.activation import FakeActivation, calibrating
from lmcompress.quantization.fake.model import FakeQuantized
from lmcompress.quantization.fake.weight import FakeWeight

__all__ = ["FakeActivation", "FakeQuantized", "FakeWeight", "calibrating"]
