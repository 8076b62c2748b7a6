"""Atomic checkpoints, and which of them a run resumes from."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.atomic import atomic, fsync, replace
from promptkd.memory import is_out_of_memory
from promptkd.models.adapter_files import join_saved, note_base
from promptkd.models.end_tokens import save_generation_config
from promptkd.models.folder import ADAPTER_CONFIG
from promptkd.results import file_sha256
from promptkd.training.student import saves_merged

MANIFEST = "manifest.json"  # files, sizes and hashes, by which a torn or altered checkpoint is known
_STAGING = ".partial"
_ASIDE = "passed-over-"  # behind the number, transformers would still take the folder for a checkpoint
_DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have words of their own for OSError


@contextmanager
def staged_checkpoint(trainer: Any) -> Iterator[None]:
    """While the trainer writes a checkpoint: into a folder that takes its name only when the disk has all of it.

    The trainer's `extra_state` and a manifest of all files are added. Older checkpoints beyond `save_total_limit` go
    after that, but for the best. Raises `PromptKDError` if it cannot be written; earlier ones are as they were.
    """
    root = Path(trainer.args.output_dir)
    name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    staging = root / _STAGING
    try:
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        trainer.checkpoint_root = staging
        try:
            yield
        finally:
            trainer.checkpoint_root = None
        _save_beside_adapter(trainer, staging / name, root / name)
        trainer.extra_state.save(staging / name, writes=trainer.args.should_save)
        point_at_best(trainer, writing=name)  # transformers noted where it stood meanwhile
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            trainer.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            write_manifest(staging / name)
            replace(staging / name, root / name)
    except _DISK_ERRORS as error:
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        if is_out_of_memory(error):
            raise
        kept = ", ".join(each.name for each in checkpoints_in(root).values())
        intact = f"Intact, for --resume: {kept}." if kept else "There is no earlier checkpoint."
        raise PromptKDError(f"{_not_written(root / name, error)} {intact}") from error
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(root),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=False,
        )
    trainer.accelerator.wait_for_everyone()


def point_at_best(trainer: Any, writing: str = "") -> None:
    """Let the trainer's state name the best checkpoint (or `writing`, if it is that) where it is: runs may be moved."""
    if trainer.state.best_global_step:
        best = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.best_global_step}"
        if best.is_dir() or best.name == writing:
            trainer.state.best_model_checkpoint = str(best)


def kept_step(trainer: Any) -> int:
    """The optimizer step of the weights that a finished trainer holds: of the best checkpoint, or the last one."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return int(best or trainer.state.global_step)


def chosen_from(trainer: Any) -> int:
    """Validations out of which a finished trainer's weights were chosen; 1 where they are simply the last."""
    validations = sum("eval_loss" in each and each["step"] > 0 for each in trainer.state.log_history)
    return max(1, validations) if trainer.args.load_best_model_at_end else 1


def prepare_best(trainer: Any) -> None:
    """Let the trainer load its best checkpoint from its own folder. Raises if it is missing or damaged."""
    best = Path(trainer.args.output_dir) / Path(str(trainer.state.best_model_checkpoint)).name
    if not best.is_dir():
        raise RequestError(
            f"The best checkpoint, {best.name}, is not in {trainer.args.output_dir}. Give --select last."
        )
    if trainer.accelerator.is_main_process and (problem := damage(best)):
        raise PromptKDError(
            f"The best checkpoint, {best}, was damaged while training went on: {problem}. Put the file back and "
            "--resume, which passes over what it cannot trust."
        )
    trainer.state.best_model_checkpoint = str(best)


def save_model_folder(trainer: Any, folder: str | Path) -> None:
    """Write a trainer's model and tokenizer atomically, as safetensors that transformers and vLLM load."""
    live = trainer.model
    try:
        if saves_merged(trainer):  # a copy, for the model may train on
            trainer.model = copy.deepcopy(trainer.accelerator.unwrap_model(live)).merge_and_unload()
        model = trainer.accelerator.unwrap_model(trainer.model)
        with whole_folder(Path(folder), writes=trainer.args.should_save) as partial:
            trainer.save_model(str(partial), _internal_call=True)
            if trainer.args.should_save and isinstance(model, PeftModel):
                join_saved(partial, model)
            _save_beside_adapter(trainer, partial)
    finally:
        trainer.model = live


def _save_beside_adapter(trainer: Any, folder: Path, place: Path | None = None) -> None:
    """Write what ends the responses of a model with an adapter, and where its base is as seen from `place`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.args.should_save and isinstance(model, PeftModel) and (folder / ADAPTER_CONFIG).is_file():
        save_generation_config(model, folder)
        note_base(folder, model, place=place)


@contextmanager
def whole_folder(target: Path, *, writes: bool) -> Iterator[Path]:
    """A folder that replaces `target` once all is written. Raises `PromptKDError` if it cannot be; `target` stays."""
    try:
        with atomic(target, writes=writes) as partial:
            yield partial
    except _DISK_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise PromptKDError(_not_written(target, error)) from error


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their steps, in rising order."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    named = {each.name.removeprefix(prefix): each for each in folder.glob(f"{prefix}*") if each.is_dir()}
    return dict(sorted((int(step), each) for step, each in named.items() if step.isdecimal()))


def told_last_checkpoint(args: Any) -> str:
    """What a run with these training arguments has kept when it fails, as a sentence."""
    written = list(checkpoints_in(Path(args.output_dir)).values())
    if not written:
        return "No checkpoint was written yet."
    return f"{written[-1]} is intact{'.' if args.save_only_model else '; --resume starts from it.'}"


def resumable_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in `folder` that is intact, as is the best one that it knows of; and what newer ones lack.

    None if there is no checkpoint at all. Raises `PromptKDError` if there are some, but none to resume from.
    """
    for staged in checkpoints_in(folder / _STAGING).values():  # whole when the process was killed before the rename
        if not (folder / staged.name).exists() and damage(staged) is None:
            os.replace(staged, folder / staged.name)
    found = checkpoints_in(folder)
    problems: dict[Path, str] = {}
    for checkpoint in reversed(found.values()):
        problem = damage(checkpoint) or _damage_of_best(checkpoint, found)
        if problem is None:
            return checkpoint, problems
        problems[checkpoint] = problem
    if problems:
        listed = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in problems.items())
        raise PromptKDError(
            f"No checkpoint in {folder} can be resumed: {listed}. Nothing was deleted. Put the files back, or "
            "start again with --overwrite or another --out."
        )
    return None, {}


def set_aside(checkpoints: Mapping[Path, str]) -> None:
    """Rename checkpoints that were passed over, so that none of them counts among a run's own; none is deleted."""
    for checkpoint in checkpoints:
        aside = checkpoint.with_name(_ASIDE + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time at this step
        os.replace(checkpoint, aside)


def _damage_of_best(checkpoint: Path, found: Mapping[int, Path]) -> str | None:
    """What is wrong with the best checkpoint until this one, which the run's student may come from."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())["best_global_step"]
    if best is None or found.get(best) == checkpoint:
        return None
    if best not in found:
        return f"the best checkpoint until then, {PREFIX_CHECKPOINT_DIR}-{best}, is missing"
    problem = damage(found[best])
    return None if problem is None else f"of the best checkpoint until then, {found[best].name}, {problem}"


def _not_written(place: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()).removesuffix(".")
    there = next(folder for folder in place.absolute().parents if folder.is_dir())
    return f"Could not write {place} ({shutil.disk_usage(there).free / 2**20:,.0f} MiB are free there): {reason}."


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the size and SHA-256 of every other file below `folder`. The disk has all of them then."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in files:
        fsync(path)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` closed; None if every byte of the listed files is as it was."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        listed = json.loads(manifest.read_bytes())["files"]
        sizes = {folder / name: entry["size"] for name, entry in listed.items()}
        hashes = {folder / name: entry["sha256"] for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for path, size in sizes.items():
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(folder)} has {path.stat().st_size:,} bytes in place of {size:,}"
    for path, sha256 in hashes.items():
        try:
            same = file_sha256(path) == sha256
        except OSError as error:
            return f"{path.relative_to(folder)} cannot be read ({error.strerror})"
        if not same:
            return f"{path.relative_to(folder)} holds other bytes than were written"
    return None
