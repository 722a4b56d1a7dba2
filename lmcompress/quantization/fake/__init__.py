"""A model that computes with quantized numbers while its weights stay as they are, to be trained or to be packed.

**Weights.** The class of a module that is quantized becomes one whose ``weight`` is a property: whoever reads it, the
module's own ``forward`` or a loss over the vocabulary, gets quantized values with a gradient to the parameter, which
stays where it was under its own name. So tied matrices stay tied and are quantized once, and checkpoints of a training
are ordinary ones of the full-precision weights. (``torch.nn.utils.parametrize`` would rename every tensor.)

**Activations.** Inputs of matmuls by forward pre-hooks; within attention by
:mod:`lmcompress.nn.quantized_attention`.

What is learned on top, γ, clips and steps, belongs to no module of the model: it is in :attr:`FakeQuantized.state`, for
a learning rate of its own.
"""

from lmcompress.quantization.fake.activation import FakeActivation, calibrating
from lmcompress.quantization.fake.model import FakeQuantized
from lmcompress.quantization.fake.weight import FakeWeight

__all__ = ["FakeActivation", "FakeQuantized", "FakeWeight", "calibrating"]
