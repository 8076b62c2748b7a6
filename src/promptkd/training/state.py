"""All that a checkpoint of promptkd holds beyond transformers' own: method.json and method.safetensors."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer

from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError, check_all
from promptkd.objectives import Moving
from promptkd.responses import Responses
from promptkd.training.guard import Guard
from promptkd.training.own_teacher import MovingAverage
from promptkd.training.state_files import has_state, read_state, write_state
from promptkd.training.teacher_tuner import TeacherTuner, TeacherTuners

_NAME, _OLD_FILE = "method", "method.pt"  # of older versions, which torch wrote
_OTHER_RUN = "Cannot take up this checkpoint, which is of another kind of run"
_ADVICE = "Resume with the method and the teacher of the run that wrote it, or start a new run."


def hash_of_rows(rows: Sequence[EncodedExample]) -> str:
    """Over the tokens that models read of the rows, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        for ids in (row.prompt_ids, row.response_ids, row.teacher_prompt_ids or []):
            found.update(array("q", [len(ids), *ids]).tobytes())
    return found.hexdigest()


class PartialLog:
    """The sums of a logged line that is not complete yet, so that a resumed run logs the same line."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._resumed: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """All processes must ask together."""
        trainer = self._trainer
        return {
            "loss": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist(),  # one per process
            "logged": trainer._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "tokens": trainer._total_train_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state` once training begins: transformers sets the sums to 0 between loading and that."""
        self._resumed = state

    def begin(self) -> None:
        """Put resumed sums where transformers adds to them. To be called when training begins."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        trainer, losses, accelerator = self._trainer, state["loss"], self._trainer.accelerator
        is_same_launch = len(losses) == accelerator.num_processes
        own = losses[accelerator.process_index] if is_same_launch else sum(losses) / len(losses)
        trainer._tr_loss = torch.tensor(own, device=accelerator.device)
        trainer._globalstep_last_logged = state["logged"]
        trainer._metrics["train"].update({name: list(values) for name, values in state["metrics"].items()})
        trainer._total_train_tokens = state["tokens"]


class ExtraState:
    """Adapter, its optimizer and schedule, the source of responses, the guard and the line to be logged.

    With a teacher that is the student's moving average, that too; and what moves of the method's objective. And a hash
    of the training rows, since a checkpoint knows by number which of them come next.
    """

    def __init__(
        self,
        log: PartialLog,
        guard: Guard,
        *,
        rows: Sequence[EncodedExample] | None = None,
        responses: Responses | None = None,
        tuner: TeacherTuner | TeacherTuners | None = None,
        average: MovingAverage | None = None,
        moving: Moving | None = None,
    ):
        self._log, self._guard, self._responses, self._tuner = log, guard, responses, tuner
        self._average, self._rows = average, rows
        keeps = moving is not None and type(moving).state_dict is not Moving.state_dict
        self._moving = moving if keeps else None  # others have nothing to keep

    @cached_property
    def _hash(self) -> str:
        return hash_of_rows(self._rows or ())

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts; of the source of responses, one per process. All processes must ask together."""
        state: dict[str, Any] = {"log": self._log.state_dict(), "guard": self._guard.state_dict()}
        if self._rows is not None:
            state["rows"] = self._hash
        if self._responses is not None:
            state["responses"] = gather_object([self._responses.state_dict()])
        if self._average is not None:
            state["average"] = self._average.state_dict()
        if self._moving is not None:
            state["moving"] = self._moving.state_dict()
        return state | ({} if self._tuner is None else self._tuner.state_dict())

    def load_state_dict(self, state: Mapping[str, Any], *, process: int = 0) -> None:
        """Resume from `state` on process number `process`. Raises `RequestError` for that of another kind of run."""
        moves = "moving" in state, self._moving is not None, "coefficients of a moving objective (TAID, DistiLLM-2)"
        self._check(state, moves)
        if self._rows is not None and "rows" in state and state["rows"] != self._hash:
            told = "the training rows are others than when it was written: their file, template or limits have changed"
            raise RequestError(f"Cannot take up this checkpoint: {told}. Put them back, or start a new run.")
        self._log.load_state_dict(state["log"])
        self._guard.load_state_dict(state["guard"])
        if self._responses is not None:
            responses = state["responses"]  # with fewer processes than before, what the last ones kept is lost
            self._responses.load_state_dict(responses[process % len(responses)])
        if self._moving is not None:
            try:
                self._moving.load_state_dict(state["moving"])
            except KeyError as error:
                held = ", ".join(state["moving"])
                problem = f"its objective has kept {held}, and that of this run needs {error}"
                raise RequestError(f"{_OTHER_RUN}: {problem}. {_ADVICE}") from error
        if self._tuner is not None:
            self._tuner.load_state_dict(state)
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    def load_adapter(self, checkpoint: str | Path) -> None:
        """Take the teacher's part alone from a checkpoint, as for the best model at the end of training."""
        if self._tuner is None and self._average is None:
            return
        state = self._read(checkpoint)
        self._check(state)
        if self._tuner is not None:
            self._tuner.load_adapter(state)
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    def _check(self, saved: Mapping[str, Any], *others: tuple[bool, bool, str]) -> None:
        """Refuse a state that has a part which this run lacks, or lacks one which it has; `others` are such parts."""
        parts = [
            ("average" in saved, self._average is not None, "a moving average of the student (the teacher ema)"),
            ("adapter" in saved or "teachers" in saved, self._tuner is not None, "a trained part of the teacher"),
            *others,
        ]
        of_one = isinstance(self._tuner, TeacherTuner) and "teachers" in saved
        checks = [
            *((held and not wanted, f"it holds {told}, and this run has none") for held, wanted, told in parts),
            *(
                (wanted and not held, f"it holds no {told.removeprefix('a ')}, and this run has {told}")
                for held, wanted, told in parts
            ),
            (
                of_one,
                f"it holds the teachers {', '.join(saved.get('teachers', ()))}, and this run has one without a name",
            ),
        ]
        check_all(_OTHER_RUN, checks, _ADVICE)

    def save(self, checkpoint: Path, *, writes: bool) -> None:
        """Write into a checkpoint's folder. All processes must come here together; one of them `writes`."""
        state = self.state_dict()
        if writes:
            write_state(checkpoint / _NAME, state)

    def load(self, checkpoint: str | Path, *, process: int) -> None:
        """Resume from a checkpoint's folder. Raises `RequestError` if it holds no such state."""
        self.load_state_dict(self._read(checkpoint), process=process)

    @staticmethod
    def _read(checkpoint: str | Path) -> dict[str, Any]:
        state, old = Path(checkpoint) / _NAME, Path(checkpoint) / _OLD_FILE
        if has_state(state):
            return dict(read_state(state))
        if not old.is_file():
            raise RequestError(f"Expected the method's state at {state}.json.")
        return torch.load(old, map_location="cpu", weights_only=True)
