"""Student and teacher measured on a few rows before training: seconds that tell whether the run can work at all."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.data.summary import row_counts
from promptkd.data.templates import resolve_template
from promptkd.engine import Vocabulary, evaluating
from promptkd.evaluation.measure import batches_by_length, decode_rows, reference_nats, token_divergences
from promptkd.objectives import reverse_kl
from promptkd.objectives.kernels import top_overlap
from promptkd.record_parts import Preflight
from promptkd.training.distributed import autocast
from promptkd.training.validation import validation_decoding

ROWS = 8
_FIRST, _SECONDS = 2, 20.0  # the teacher answers two rows, and the others if that took less than so many seconds


def preflight(trainer: Any, train: EncodedData, *, own_teacher: bool = False) -> Preflight:
    """What a `DistillTrainer` is about to do, and its models on up to 8 rows: of the validation data, if there are any.

    Nothing is drawn from the run's random generators, and nothing of the models changes. With sharded weights, and
    where student and teacher are not compared, they are not measured. In runs of several processes, for the first one.
    """
    tokenizer, args = trainer.processing_class, trainer.args
    seen = Preflight(
        rows=row_counts(train),
        template=resolve_template(args.template, tokenizer, args.chat_template_kwargs).name,
        turns=train.turns,
        ends=_named(tokenizer, trainer.stop_ids),
        teacher_ends=_named(tokenizer, _teacher_ends(trainer)),
        limit=args.max_completion_length,
        vocabulary=trainer.teacher.vocabulary.size,
        own_teacher=own_teacher,
    )
    if trainer.is_sharded or not trainer.compares:
        if trainer.is_sharded:
            seen.unmeasured = "their weights are spread over processes"
        else:
            seen.unmeasured = "they share no vocabulary" if trainer.shared is None else "no teacher is in memory"
        return seen
    name = trainer.teacher.name  # of several, the first
    rows = [row for row in trainer.validation_rows or train.examples if name in ("", row.teacher)]
    rows = rows or [row for row in train.examples if row.teacher == name]
    rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    started = time.perf_counter()
    with autocast(trainer.accelerator, args):
        trainer.on_models(lambda student, teacher: _measure(seen, trainer, rows, student, teacher))
    seen.seconds = time.perf_counter() - started
    return seen


def _measure(
    seen: Preflight, trainer: Any, rows: Sequence[EncodedExample], student: nn.Module, teacher: nn.Module
) -> None:
    tokenizer, size = trainer.processing_class, trainer.args.per_device_eval_batch_size
    vocabulary = trainer.teacher.vocabulary
    decoding = validation_decoding(trainer).plain(trainer.args.eval_seed)
    seen.measured_rows = len(rows)
    seen.contexts = sum(row.teacher_prompt_ids is not None for row in rows)
    if referenced := [row for row in rows if row.response_ids]:
        tokens = sum(len(row.response_ids) for row in referenced)
        seen.reference_length = tokens / len(referenced)
        seen.student_loss, seen.teacher_loss = (
            sum(reference_nats(model, read, vocabulary, size)) / tokens
            for model, read in ((student, referenced), (teacher, [row.for_teacher() for row in referenced]))
        )
    samples = decode_rows(student, tokenizer, rows, decoding)
    kl, overlap = _compared(student, teacher, rows, samples, vocabulary, size)
    tokens = sum(map(len, samples))
    seen.kl_to_teacher, seen.kl_per_response, seen.top_overlap = kl / tokens, kl / len(rows), overlap / tokens
    seen.response_length = tokens / len(rows)
    read = [row.for_teacher() for row in rows]
    started, answers = time.perf_counter(), decode_rows(teacher, tokenizer, read[:_FIRST], decoding)
    if read[_FIRST:] and time.perf_counter() - started < _SECONDS:
        answers += decode_rows(teacher, tokenizer, read[_FIRST:], decoding)
    ended = [answer[-1] in trainer.stop_ids for answer in answers]
    seen.teacher_answers, seen.teacher_cut = len(answers), ended.count(False)
    seen.teacher_length = sum(map(len, answers)) / len(answers)
    cut = [answer for answer, done in zip(answers, ended, strict=True) if not done]
    marks = _teacher_ends(trainer).union(*(row.prompt_ids for row in rows)).intersection(tokenizer.all_special_ids)
    marks -= {*trainer.stop_ids, tokenizer.unk_token_id}
    written = Counter(token for answer in cut for token in marks.intersection(answer))
    if written:
        token, seen.teacher_control_answers = written.most_common(1)[0]
        (seen.teacher_control,) = _named(tokenizer, [token])


def _compared(
    student: nn.Module,
    teacher: nn.Module,
    rows: Sequence[EncodedExample],
    samples: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    size: int,
) -> tuple[float, float]:
    """Σ KL(student || teacher) in nats, and the number of equal top tokens, over all tokens of the samples."""

    def both(logits: Tensor, target: Tensor) -> Tensor:
        return torch.stack([reverse_kl(logits, target), top_overlap(logits, target)], dim=-1)

    prompts, sums = [row.prompt_ids for row in rows], torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), evaluating(student), evaluating(teacher):
        for indices, batch in batches_by_length(prompts, samples, size, student):
            read = batch.with_prompts([rows[index].teacher_prompt_ids for index in indices])
            sums += token_divergences(both, student, teacher, batch, vocabulary, read=read).double().sum(0).cpu()
    return float(sums[0]), float(sums[1])


def _teacher_ends(trainer: Any) -> set[int]:
    """The ids that the teacher's own generation configuration ends with."""
    config = trainer.teacher.generation_config
    ends = None if config is None else config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {ends}


def _named(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids)]
