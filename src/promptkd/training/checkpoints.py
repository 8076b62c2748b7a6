"""Checkpoints that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

__all__ = ["checkpoints_in", "last_checkpoint", "staged_checkpoint"]


@contextmanager
def staged_checkpoint(trainer: Any) -> Iterator[Path]:
    """A folder to write the trainer's checkpoint in; it takes its name only when everything is written.

    Older checkpoints beyond `save_total_limit` go after that, never before.
    """
    root = Path(trainer.args.output_dir)
    name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    staging = root / ".partial"
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    yield staging
    if trainer.state.best_global_step:
        best = root / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.best_global_step}"
        if best.is_dir() or best.name == name:
            trainer.state.best_model_checkpoint = str(best)  # transformers noted where it stood meanwhile
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(staging / name, root / name)
        shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(root),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in `folder` by their steps, in rising order."""
    found = {
        int(each.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): each
        for each in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if each.is_dir() and each.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()
    }
    return dict(sorted(found.items()))


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None."""
    return next(reversed(checkpoints_in(folder).values()), None)
