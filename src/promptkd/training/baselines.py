"""What a run's student is held against: itself before the first step, and the teacher, on the validation rows."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import TrainerCallback

from promptkd.data import EncodedExample, stop_token_ids
from promptkd.engine import release, unwrap_peft
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import evaluation_of
from promptkd.evaluation.rouge_tokenizer import rouge_tokens
from promptkd.memory import is_out_of_memory
from promptkd.results import BEFORE, Results, RowResult
from promptkd.training.distributed import autocast, is_sharded
from promptkd.training.validation import validation_decoding

TEACHER = "teacher"


class Baselines(TrainerCallback):
    """Measures both when training begins, and keeps the answers in `file`, where a resumed run finds them.

    A run that is resumed without that file can measure the teacher alone. A teacher whose weights are spread over
    processes is left out: rows end at different tokens, and it runs only where all processes run it. So is one that
    cannot be read by the student's tokenizer, one of which there are kept logits alone, and one that is the student
    itself (`with_teacher` False).
    """

    def __init__(self, trainer: Any, file: Path, say: Callable[[str], None], *, with_teacher: bool = True):
        self._trainer, self._file, self._say, self._with_teacher = trainer, file, say, with_teacher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = [self._file.is_file()]
        broadcast_object_list(kept)  # which the first process looks for
        wanted = [] if state.global_step else [BEFORE]
        spread = is_sharded(self._trainer.accelerator)
        wanted += [TEACHER] if self._with_teacher and not spread and self._trainer.compares else []
        if kept[0] or not wanted:
            return
        started, rows = time.perf_counter(), self._trainer.validation_rows
        names_of = {BEFORE: f"the {BEFORE}", TEACHER: "the teacher"}
        names = " and ".join(names_of[each] for each in wanted)
        self._say(f"Measuring {names} on {len(rows)} rows; --measure student leaves this out.")
        record = Results(kind="distill")
        for label in wanted:
            try:
                scored = self._scored(label)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_out_of_memory(error) or self._trainer.accelerator.num_processes > 1:  # others would wait
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold tensors
                self._trainer.phases.restart()
                less = "a smaller --generation_batch_size needs less"
                note = f"There was no memory to measure {names_of[label]}; {less}."
                record.notes.append(note)
                self._say(note)
                continue
            decoding = validation_decoding(self._trainer)
            tokens = rouge_tokens(args.rouge_tokenizer, self._trainer.processing_class).name
            labels = {"model": label, "data": "validation", "rouge_tokenizer": tokens}
            evaluation = evaluation_of(scored, decoding, [decoding.seed], **labels)
            record.evaluations.append(evaluation)
        seconds = record.timings["baselines"] = time.perf_counter() - started
        self._say(f"That took {seconds:.0f} s.")
        if self._trainer.accelerator.is_main_process:
            record.write(self._file)

    def _scored(self, label: str) -> list[RowResult]:
        """Each process answers its part of the rows, or all of them where weights are sharded."""
        trainer, args = self._trainer, self._trainer.args
        accelerator, decoding, tokenizer = trainer.accelerator, validation_decoding(trainer), trainer.processing_class
        scoring = {"batch_size": args.per_device_eval_batch_size, "rouge_tokenizer": args.rouge_tokenizer}
        count = 1 if is_sharded(accelerator) else accelerator.num_processes
        rows = trainer.validation_rows[accelerator.process_index % count :: count]

        def measured(student: nn.Module, teacher: nn.Module | None, rows: Sequence[EncodedExample]) -> list[RowResult]:
            if label == BEFORE or teacher is None:
                return measure_rows(student, tokenizer, rows, decoding, teacher=teacher, **scoring)
            ends = stop_token_ids(tokenizer, unwrap_peft(teacher).generation_config, args.template)
            own, read = (
                replace(decoding, stop_ids=tuple({*decoding.stop_ids, *ends})),
                [row.for_teacher() for row in rows],
            )
            try:
                return measure_rows(teacher, tokenizer, read, own, **scoring)
            finally:
                release(teacher)  # training decodes with the student alone

        with trainer.phases("validation"), autocast(accelerator, args):
            scored = trainer.on_rows(measured, rows)
        scored = gather_object(scored) if count > 1 else scored
        return sorted(scored, key=lambda each: each.row)
