"""What a trainer does with its methods before, between and after steps: preparing, finishing, saving, handing back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from lmcompress.errors import LmcompressError
from lmcompress.families import is_described
from lmcompress.method import Method, StepCallback, SteppedMethod
from lmcompress.model import HELD, CompressedModel, library_version, refuse_unfinished, unwrapped
from lmcompress.trainers.building import Asked
from lmcompress.trainers.hub import Pushing
from lmcompress.trainers.precision import in_float32
from lmcompress.trainers.saving import probes, write_finished
from lmcompress.trainers.state import describe_structure, load_state, save_state

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class MethodsTrainer(Pushing, Trainer):  # type: ignore[misc]
    """A ``Trainer`` that prepares methods, finishes them after training, and saves what they made.

    Attributes:
        student: the model, not wrapped; also ``model``.
        methods: the methods of the run, in order.
        auto_finish: whether :meth:`train` calls :meth:`finish` at its end.
        finished: whether :meth:`finish` was called.
        cut_short: what training did not do before it ended, by name of the method.
    """

    student: Any
    methods: list[Method]
    auto_finish: bool
    finished: bool = False
    cut_short: dict[str, str] = {}
    _asked: Asked
    _float32_weights: bool
    _wrapper: CompressedModel | None = None
    _checkpointing: bool = False
    _prepared: bool = False
    _released: bool = False
    # finish() has begun; an interrupt may have left it half done
    _finishing: bool = False

    # the model

    @property
    def compressed_model(self) -> CompressedModel:
        """The student with the record of its compression; its ``model`` is the trainer's.

        Raises:
            LmcompressError: If the student is no model of transformers, or of a family that is not known.
        """
        if self._wrapper is None or self._wrapper.model is not self.student:
            self._wrapper = CompressedModel(self.student)
        return self._wrapper

    def _adopt(self, model: Any) -> Any:
        """The student out of what was given: not wrapped, not compiled, with weights in float32."""
        model = getattr(model, "_orig_mod", model)
        if type(model) is CompressedModel:
            self._wrapper = model
        if not isinstance(model, nn.Module):
            raise LmcompressError(
                f"the student must be a model, got {type(model).__name__}; load the model with "
                "AutoModelFor....from_pretrained first"
            )
        model = unwrapped(model)
        self.student = in_float32(model) if self._float32_weights else model
        if is_described(model):
            describe_structure(model)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new student from ``model_init``, with methods of its own.

        Args:
            trial: trial of a search over hyperparameters.

        Returns:
            The student.
        """
        student = self._adopt(super().call_model_init(trial))
        if self._prepared:
            if self.place_model_on_device:
                self._move_model_to_device(student, self.args.device)
            self.model = student
            self._prepare_methods()
        return student

    def _prepare_methods(self) -> None:
        # of an earlier trainer that was interrupted: its gates and quantizers would stay on the model
        for method in self.student.__dict__.pop(HELD, ()):
            method.detach()
        for method in self.methods if self._prepared else ():
            method.detach()
        self.methods = self._asked.build(self.student, again=self._prepared)
        if self.args.torch_compile and self.methods:
            # code compiled for a model of this class without hooks would be taken for the one with hooks
            torch.compiler.reset()
        self.finished = self._finishing = self._released = False
        done: list[Method] = []
        try:
            for method in self.methods:
                done.append(method)
                method.prepare(self)
        except BaseException:
            # nothing stays on a student or a teacher that was refused
            for method in reversed(done):
                _quietly(method.detach)
            raise
        self.student.__dict__[HELD] = _Held(self.methods)
        if not self._prepared:
            self.add_callback(StepCallback(self))
        self._prepared = True

    # training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> Any:
        """Train, and finish the methods; see :meth:`finish` and ``Trainer.train``.

        Args:
            resume_from_checkpoint: as for ``Trainer``.
            trial: as for ``Trainer``.
            **kwargs: as for ``Trainer``.

        Returns:
            The output of ``Trainer``.

        Raises:
            LmcompressError: If none of the student's weights is trained, or the methods were finished or released and
                cannot go on.
        """
        if self.model_init is None:
            self._ready_to_train()
        try:
            output = super().train(resume_from_checkpoint, trial, **kwargs)
        finally:
            # whatever happens: a teacher is borrowed
            for method in self.methods:
                method.release()
        if self.auto_finish:
            self.finish()
            self._publish()
        return output

    def _ready_to_train(self) -> None:
        if self._released:
            raise LmcompressError("the trainer has let go of its model: release() came before; create a new trainer")
        if self._finishing and (ended := [method.name for method in self.methods if not method.goes_on]):
            has = "has finished, the model is" if self.finished else "was interrupted in finish(), the model may be"
            raise LmcompressError(
                f"training cannot go on: {' and '.join(ended)} {has} cut or packed. To train in "
                "several calls, pass auto_finish=False and call finish() after the last; to train the finished model, "
                "create a new trainer for it"
            )
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise LmcompressError(
                "no weight of the student is trainable, so training would change nothing of it: all have "
                "requires_grad=False. Is it a copy of a model that was frozen? Call student.requires_grad_(True)"
            )
        self.finished = self._finishing = False
        for method in self.methods:
            method.resume(self)

    def freeze(self) -> None:
        """Freeze the decisions of every method: the model already computes what it will after :meth:`finish`."""
        for method in self.methods:
            method.freeze()

    def finish(self) -> None:
        """Freeze the decisions of every method, materialize them and remove the hooks.

        :meth:`train` calls it at its end, unless ``auto_finish`` is false. Calling it twice changes nothing.
        """
        if self.finished:
            return
        self._finishing = True
        self.freeze()
        for method in self.methods:
            method.finish()
            if text := self.cut_short.get(method.name):
                logger.warning("%s", text)
                report = getattr(method, "report", None)
                if hasattr(report, "unrecovered"):
                    method.report = replace(report, unrecovered=text)  # type: ignore[attr-defined, type-var]
        self.finished = True
        self.student.__dict__.pop(HELD, None)
        if any(not method.goes_on for method in self.methods):
            # neither the wrappers nor the optimizer know the weights that there are now, nor does compiled code
            if self.args.torch_compile:
                torch.compiler.reset()
            self.model_wrapped = self.model
            self.optimizer = self.lr_scheduler = None
        if self.methods and is_described(self.student):
            compressed, names = self.compressed_model, [method.name for method in self.methods]
            applied = dict.fromkeys((*compressed.provenance.methods, *names))
            compressed.provenance = compressed.provenance.model_copy(
                update={"methods": tuple(applied), "library_version": library_version()}
            )

    def release(self) -> None:
        """Let go of the student and the teachers without finishing: all hooks are removed.

        A trainer is also a context manager, which calls this at the end of the block unless it has finished.
        """
        for method in self.methods:
            method.detach()
        self.student.__dict__.pop(HELD, None)
        self._released = not self.finished

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # saving and loading

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the finished model as :meth:`CompressedModel.save_pretrained` does: packed, checked, with its card.

        Other files of the folder, such as training checkpoints, stay. A student that
        :class:`~lmcompress.model.CompressedModel` does not know is written as ``Trainer`` writes it.

        Args:
            output_dir: default: that of the arguments.
            _internal_call: whether ``Trainer`` calls.

        Raises:
            LmcompressError: If methods are not finished, so that the weights alone would be another model.
        """
        if self._checkpointing:
            self._write_checkpoint(output_dir, _internal_call)
            if self.args.should_save:
                save_state(self.methods, output_dir or self.args.output_dir)
            return
        self._refuse_unfinished()
        if not self._saves_compressed:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            self._write_finished(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    def _write_checkpoint(self, folder: str | None, internal: bool) -> None:
        super().save_model(folder, internal)

    def _write_finished(self, folder: Path) -> None:
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        write_finished(self.compressed_model, folder, tokenizer=tokenizer, batches=probes(self))

    @property
    def _saves_compressed(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return is_described(self.student) and not sharded and not _has_adapters(self.student)

    @property
    def _unfinished(self) -> list[str]:
        """Methods that hold something of the model outside of its weights."""
        if self.finished or self._released:
            return []
        return [method.name for method in self.methods if not method.goes_on]

    def _refuse_unfinished(self) -> None:
        refuse_unfinished(
            self._unfinished,
            "Call finish() first (train() does so at its end unless auto_finish=False), or go on from a training "
            "checkpoint",
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._checkpointing = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._checkpointing = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_student(resume_from_checkpoint, model)
        load_state(self.methods, resume_from_checkpoint)

    def _load_student(self, folder: str, model: nn.Module | None) -> None:
        super()._load_from_checkpoint(folder, model)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # a checkpoint that is not yet as small as asked is better, and not what is wanted
        if all(method.complete for method in self.methods):
            return bool(super()._determine_best_metric(*args, **kwargs))
        return False

    def _load_best_student(self) -> None:
        super()._load_best_model()

    def _load_best_model(self) -> None:
        self._load_best_student()
        load_state(self.methods, self.state.best_model_checkpoint)
        for method in self.methods:
            if isinstance(method, SteppedMethod):
                method.restored()

    def _publish(self) -> None:
        """After training: the finished model where training wrote what is not finished."""
        last = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        is_kept = best is None or Path(best) == last
        changes = any(not method.goes_on for method in self.methods)
        replaces = self.args.save_only_model and self.args.should_save and changes and is_kept
        if replaces and last.is_dir() and self._saves_compressed:
            # it cannot be resumed from, so it is there to be loaded
            self._write_finished(last)
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub()

    @contextmanager
    def _inactive(self) -> Iterator[None]:
        """Methods record nothing within."""
        for method in self.methods:
            method.set_active(False)
        try:
            yield
        finally:
            for method in self.methods:
                method.set_active(True)


class _Held(list[Method]):
    """Methods that have hooks on a student; a copy of the student does not have them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held()

    def __reduce__(self) -> Any:
        return _Held, ()


def _has_adapters(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False)) or hasattr(model, "get_base_model")


def _quietly(undo: Any) -> None:
    try:
        undo()
    except (AttributeError, LmcompressError):
        # prepare() ended before there was anything to undo
        pass
