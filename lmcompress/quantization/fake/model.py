"""A fake-quantized model: quantizers added, calibrated, switched, removed, or turned into codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hooks import Hooked
from lmcompress.activations.running import evaluating
from lmcompress.checkpoint.places import Packable
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of, is_conv1d, readers_of_encoder
from lmcompress.families.coupled import stage_of
from lmcompress.families.weights import modules_by_path
from lmcompress.nn.padding import follow_padding, release_padding
from lmcompress.nn.quantized_attention import ROLES, Role, attach, release_attention
from lmcompress.numerics.grids import Bits
from lmcompress.numerics.quantizers.base import Quantized
from lmcompress.numerics.quantizers.registry import quantizer_for
from lmcompress.quantization.config import ActivationScheme
from lmcompress.quantization.fake.activation import AttentionFakes, FakeActivation, calibrating
from lmcompress.quantization.fake.weight import Faked, FakeWeight, fake_quantize_module, release_module
from lmcompress.quantization.packing import AttentionRanges, FixedActivation, pack
from lmcompress.quantization.planning import Plan, Planned, reads_alike, stored_weight


class FakeQuantized(Hooked):
    """A model that computes with quantized numbers, as a plan says; its parameters keep their values and their names.

    Args:
        model: modified in place, until :meth:`remove` or :meth:`finish`.
        plan: plan of this model.
        batches: batches for calibrated ranges, see :meth:`calibrate`; not needed if all are dynamic.
        with_states: whether the initial state of every quantizer is found now, which takes some twenty passes over all
            weights with ``mse``. Without them, the codes of each matrix must come by :meth:`FakeWeight.freeze`.

    Attributes:
        weights: the quantizer of each matrix, by its path.
        activations: the quantizer of each activation, by its name.
        inputs: the activation that a matrix is multiplied by, by the path of the matrix; for embeddings, that of the
            tied head.
        state: learned or calibrated values, as a module whose ``state_dict`` belongs in training checkpoints.

    Raises:
        LmcompressError: If the model is fake-quantized already, the plan is of another model, weights are NaN or
            infinite, or calibration has no data.

    Note:
        With ranges of the whole tensor, the other rows of a batch influence dynamic ranges, as in TernaryBERT's code;
        padding according to ``attention_mask`` influences neither these nor calibrated ranges.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        batches: Iterable[Mapping[str, Any]] | None = None,
        *,
        with_states: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        self._modules = modules_by_path(model)
        self._depth = 0
        self._check()
        # everything that can be refused is refused before the model is changed
        self.weights = {planned.path: self._fake_weight(planned, with_states) for planned in plan.matrices}
        self.activations: dict[str, FakeActivation] = {}
        self.inputs: dict[str, FakeActivation] = {}
        self._readers: list[tuple[nn.Module, FakeActivation]] = []
        self._plan_inputs()
        self._attention = self._plan_attention()
        self.state = nn.ModuleDict(
            {
                "weights": nn.ModuleDict({_key(path): fake for path, fake in self.weights.items()}),
                "activations": nn.ModuleDict({_key(name): fake for name, fake in self.activations.items()}),
            }
        ).to(model.device)
        self._put()
        if batches is not None:
            try:
                self.calibrate(batches)
            except BaseException:
                self.remove()
                raise

    def scales(self) -> dict[str, nn.Parameter]:
        """The learned values besides the weights.

        Returns:
            γ, clip or step of a matrix by its path; step and offset of an activation by its name.
        """
        found = {path: fake.state for path, fake in self.weights.items() if isinstance(fake.state, nn.Parameter)}
        for name, activation in self.activations.items():
            found |= {f"{name}.{key}": parameter for key, parameter in activation.named_parameters()}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """The same without names, for an optimizer; without weight decay."""
        return list(self.scales().values())

    def quantized(self) -> dict[str, Quantized]:
        """Every matrix quantized from its current values, without gradient.

        Returns:
            Values, codes and scales by path, of the matrix as ``(out, in)``.
        """
        return {path: self.quantized_matrix(path) for path in self.weights}

    @torch.no_grad()
    def quantized_matrix(self, path: str) -> Quantized:
        """One matrix quantized from its current values, without gradient.

        Args:
            path: path of its module.

        Returns:
            Values, codes and scales of the matrix as ``(out, in)``.
        """
        return self.weights[path].quantize(self.parameter(path).detach())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Calibrate static ranges, and initialize learned ones, on a few batches.

        The model runs in evaluation mode with quantized weights and activations as they are. Padding according to the
        batch's ``attention_mask`` is ignored.

        Args:
            batches: model inputs; ``labels`` are ignored.

        Raises:
            LmcompressError: If there is no batch, or no batch reaches an activation with anything but zeros.
        """
        waiting = [a for a in self.activations.values() if a.scheme.range != "dynamic"]
        if not waiting:
            return
        enabled = [activation for activation in self.activations.values() if activation.enabled]
        with evaluating(self.model), calibrating(waiting):
            try:
                for activation in enabled:
                    activation.enabled = False
                for batch in batches:
                    inputs = {key: _moved(value, self.model.device) for key, value in batch.items() if key != "labels"}
                    self.model(**inputs)
            finally:
                for activation in enabled:
                    activation.enabled = True

    def set_enabled(self, enabled: bool, what: Literal["weights", "activations"] | None = None) -> None:
        """Switch quantization on or off; off, the model computes bit-exactly as before.

        Args:
            enabled: whether to quantize.
            what: only weights or only activations; ``None``: both.
        """
        kinds: dict[str, Iterable[FakeWeight | FakeActivation]] = {
            "weights": self.weights.values(),
            "activations": self.activations.values(),
        }
        for kind, fakes in kinds.items():
            for fake in fakes if what in (None, kind) else ():
                fake.enabled = enabled

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While the block runs, quantize each weight once, not in every forward pass without gradient.

        For ``generate``, which would quantize all weights for every token. Memory holds a second copy of the weights.
        Nothing may write to a weight's ``data`` within the block.

        Yields:
            Nothing.

        Example:
            with fake.holding():
                model.generate(**inputs)
        """
        fakes = list(self.weights.values())
        for fake in fakes:
            fake.held = True
        try:
            yield
        finally:
            for fake in fakes:
                fake.held = False
                fake.forget()

    def set_bits(self, bits: Bits, modules: str = "*") -> None:
        """Change the bit-width of weights, such as on a descending schedule.

        A quantizer's learned state belongs to its bits and is reinitialized from the current weights; the parameters
        stay the same objects, for the optimizer.

        Args:
            bits: bit-width of the weights.
            modules: matrices to change, as in a :class:`~lmcompress.quantization.config.Rule`.

        Raises:
            LmcompressError: If no matrix has such a name, or a quantizer does not support these bits.
        """
        fakes = [fake for fake in self.weights.values() if fake.matches(modules)]
        if not fakes:
            raise LmcompressError(f"no quantized matrix is named {modules!r}{nearest(modules, self.weights)}")
        for fake in fakes:
            quantizer_for(fake.scheme.quantizer, bits)
        for fake in fakes:
            fake.set_bits(bits, self._stored(fake.path))

    def set_curvature(self, curvature: Mapping[str, Tensor | None]) -> None:
        """Weight the errors of ``laq``, such as by the square root of Adam's second moments.

        Args:
            curvature: by path; same shape as the stored parameter, >= 0; ``None`` weights all equally.

        Raises:
            LmcompressError: If a path is not quantized, its quantizer takes no curvature, or the shape differs.
        """
        stored = {path: self.parameter(path) for path in curvature}
        for path, values in curvature.items():
            self.weights[path].set_curvature(values, stored[path])

    def parameter(self, path: str) -> nn.Parameter:
        """The full-precision weight at a path, which training changes.

        Args:
            path: path of a quantized matrix.

        Returns:
            The parameter, as stored.

        Raises:
            LmcompressError: If no quantized matrix has the path.
        """
        if path not in self.weights:
            raise LmcompressError(f"no quantized matrix has the path {path!r}{nearest(path, self.weights)}")
        return cast(nn.Parameter, self._stored(path))

    def attention_ranges(self) -> AttentionRanges:
        """The quantization of attention once packed, by module; empty if it is not quantized.

        Raises:
            LmcompressError: If a range is not calibrated.
        """
        return {m: {role: fake.final() for role, fake in fakes.roles.items()} for m, fakes in self._attention.items()}

    def readers(self, planned: Planned) -> tuple[str, ...]:
        """Paths of the modules that multiply an activation by a matrix that is tied to a table of embeddings.

        Args:
            planned: the table.
        """
        return tuple(path for path in planned.tied if not isinstance(self._modules[path], nn.Embedding))

    def remove(self) -> None:
        """Take quantization away: the model is as it was, with the weights that it has now. Safe to call twice."""
        super().remove()
        release_attention(self.model)
        release_padding(self.model)
        for module in self.model.modules():
            release_module(module)
        self._depth = 0
        self._set_in_pass(False)
        self._forget()

    def finish(self) -> None:
        """Pack the model in place: its weights become codes, recorded in its config; nothing is fake any more.

        Raises:
            LmcompressError: If a range is not calibrated, or weights or scales are NaN or infinite; the model is then
                still fake-quantized.
        """
        ranges = {name: activation.final() for name, activation in self.activations.items()}
        attention = self.attention_ranges()
        self.remove()
        try:
            pack(self.model, self._parts(ranges), attention)
        except BaseException:
            self._put()
            raise

    def _check(self) -> None:
        if any(isinstance(module, Faked) for module in self.model.modules()):
            raise LmcompressError(
                "the model is fake-quantized already: release() of the trainer that holds it, or remove() of the "
                "FakeQuantized, takes that away; a copy is to be loaded again"
            )
        for planned in self.plan.matrices:
            for path in (planned.path, *planned.tied):
                module = self._modules.get(path)
                if module is None or stored_weight(module) is None:
                    raise LmcompressError(
                        f"the plan must be of this model, got one with a matrix {path}, which does not exist"
                        f"{nearest(path, self._modules)}"
                    )

    def _fake_weight(self, planned: Planned, with_state: bool) -> FakeWeight:
        stored, transposed = self._stored(planned.path), is_conv1d(self._modules[planned.path])
        return FakeWeight(planned, stored, transposed=transposed, with_state=with_state)

    def _plan_inputs(self) -> None:
        alike: dict[tuple[int | None, int | None, ActivationScheme], list[Planned]] = {}
        for planned in self.plan.matrices:
            if planned.inputs is None:
                continue
            if reads_alike(planned, self.plan.matrices):
                alike.setdefault((planned.block, stage_of(planned.part), planned.inputs), []).append(planned)
            else:
                # for the embeddings it is the head that reads an activation
                table = isinstance(self._modules[planned.path], nn.Embedding)
                reader = self.readers(planned) if table else (planned.path,)
                self.inputs[planned.path] = self._read(reader, planned.inputs)
        for (_, _, scheme), group in alike.items():
            activation = self._read([planned.path for planned in group], scheme)
            self.inputs |= {planned.path: activation for planned in group}

    def _read(self, paths: Sequence[str], scheme: ActivationScheme) -> FakeActivation:
        activation = FakeActivation(f"{paths[0]}.input", scheme, readers=len(paths))
        self.activations[activation.name] = activation
        self._readers += [(self._modules[path], activation) for path in paths]
        return activation

    def _plan_attention(self) -> dict[nn.Module, AttentionFakes]:
        if self.plan.attention is None:
            return {}
        paths = {id(module): path for path, module in self._modules.items()}
        fakes: dict[nn.Module, AttentionFakes] = {}
        for module in [module for block in anatomy_of(self.model).blocks for module in block.attentions()]:
            roles: dict[Role, FakeActivation] = {}
            for role in ROLES:
                scheme = self.plan.attention.resolved(one_sided=role == "probabilities")
                roles[role] = FakeActivation(f"{paths[id(module)]}.{role}", scheme)
                self.activations[roles[role].name] = roles[role]
            fakes[module] = AttentionFakes(roles)
        return fakes

    def _put(self) -> None:
        if self._attention:
            attach(self.model, self._attention)
        follow_padding(self.model, readers_of_encoder(self.model))
        for planned in self.plan.matrices:
            for path in (planned.path, *planned.tied):
                fake_quantize_module(self._modules[path], self.weights[planned.path])
        for module, activation in self._readers:
            self._handles.append(module.register_forward_pre_hook(activation.before))
        for root in {id(m): m for m in (self.model, self.model.base_model)}.values():
            self._handles.append(root.register_forward_pre_hook(self._begin))
            self._handles.append(root.register_forward_hook(self._end, always_call=True))

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Before every forward pass: what earlier ones kept is no longer needed."""
        if torch.compiler.is_compiling():
            return
        if not self._depth:
            self._forget()
            self._set_in_pass(True)
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it: with a gradient, the loss may still read a weight, which must be the one of the pass."""
        if torch.compiler.is_compiling():
            return
        self._depth = max(0, self._depth - 1)
        if not (self._depth or torch.is_grad_enabled()):
            self._forget()
            self._set_in_pass(False)

    def _set_in_pass(self, on: bool) -> None:
        for weight in self.weights.values():
            weight.in_pass = on and weight.shared

    def _parts(self, ranges: Mapping[str, FixedActivation]) -> Iterator[tuple[str, Packable]]:
        """The parts to pack, one matrix at a time: all at once would be three times the model."""
        for path in self.weights:
            fixed = ranges[self.inputs[path].name] if path in self.inputs else (None, None)
            yield path, Packable(self.quantized_matrix(path), *fixed)

    def _forget(self) -> None:
        for weight in self.weights.values():
            if not weight.held:
                weight.forget()
        for activation in self.activations.values():
            activation.forget()

    def _stored(self, path: str) -> Tensor:
        weight = stored_weight(self._modules[path])
        if weight is None:
            raise LmcompressError(
                f"{path} must keep the weight that was fake-quantized, it has none now: take quantization away with "
                "remove() before the model is changed"
            )
        return weight


def _key(path: str) -> str:
    # names of submodules have no dots
    return path.replace(".", "/")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
