"""Pushing from a trainer: the finished model and its card, none of the run's internals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from lmcompress.checkpoint.pushing import push_folder


class Pushing:
    """The parts of a ``Trainer`` that upload."""

    def push_to_hub(
        self: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the finished model as :meth:`save_model` writes it: model, tokenizer, card and report.

        Args:
            commit_message: message of the commit.
            blocking: whether to wait for the end of the upload.
            token: access token of the Hub; default: that of the arguments, or of the login.
            revision: branch; default: that of the arguments, or the main branch.
            private: whether a newly created repository is private; default: as the arguments say.
            **kwargs: ``tags`` for the model card; for a student that is saved as ``Trainer`` saves it, whatever its
                ``create_model_card`` takes.

        Returns:
            The URL of the commit, or its future if ``blocking`` is false.

        Raises:
            LmcompressError: If methods are not finished, or the upload fails.
        """
        self._refuse_unfinished()
        if not self._saves_compressed:
            return super().push_to_hub(  # type: ignore[misc]
                commit_message, blocking, token, revision, private=private, **kwargs
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        # every process, as in Trainer: only one writes
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()

        def upload() -> str:
            return push_folder(
                Path(self.args.output_dir),
                self.hub_model_id,
                private=self.args.hub_private_repo if private is None else private,
                token=token,
                revision=revision or getattr(self.args, "hub_revision", None),
                commit_message=commit_message or "End of training",
                tags=kwargs.get("tags"),
            )

        return upload() if blocking else HfApi(token=token).run_as_future(upload)

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if not self._unfinished:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
            return
        strategy = self.args.hub_strategy
        if strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) or not self.is_world_process_zero():
            # weights without their masks and quantizers are no model: train() pushes the finished one at its end
            return
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
        job = HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            path_in_repo=name,
            commit_message=f"Training in progress, step {self.state.global_step}, checkpoint",
            run_as_future=True,
            revision=getattr(self.args, "hub_revision", None),
        )
        self.push_in_progress = PushInProgress([job])
