"""Measure a model on rows: loss on the references, scores of its own answers, KL to a teacher on its own samples.

`promptkd evaluate` keeps what was decoded or measured on the disk, batch by batch; validation keeps it in memory. Rows
go into batches by the length of their prompts alone, so a resumed run ends with the bits of an undisturbed one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError
from promptkd.evaluation.function_metric import Metric
from promptkd.evaluation.measure import (
    decode_rows,
    evaluation_of,
    has_references,
    kl_nats,
    reference_nats,
    row_batches,
    row_results,
)
from promptkd.evaluation.rouge_tokenizer import DEFAULT, RougeTokenizer, rouge_tokens
from promptkd.generation import Decoding
from promptkd.io.jsonl import Line, ResumableLines
from promptkd.models import vocabulary_size
from promptkd.models.vocabulary import check_heads, vocabulary_without
from promptkd.results import Evaluation, RowResult

_REFERENCES_AT_A_TIME = 32  # rows whose references are scored together
_GREEDY, _REFERENCES = "greedy", "references"
_Measured = Callable[[list[EncodedExample], list[Line]], list[Line]]  # a batch and what is held of it to its lines


def parts_of(decoding: Decoding, seeds: Sequence[int], *, greedy: bool, kl_seeds: Sequence[int] = ()) -> list[str]:
    """What is kept, in a file each: "seed10", "greedy", "seed10-kl" (samples for the KL), "references" (losses)."""
    parts = [] if decoding.is_greedy else [f"seed{seed}" for seed in seeds]
    parts += [_GREEDY] if greedy or decoding.is_greedy else []
    parts += [] if decoding.is_plain else [f"seed{seed}-kl" for seed in kl_seeds]
    return [*parts, _REFERENCES]


def measure_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    decoding: Decoding,
    *,
    teacher: nn.Module | None = None,
    samples_per_row: int = 1,
    batch_size: int = 8,
    rouge_tokenizer: str = DEFAULT,
) -> list[RowResult]:
    """Scores of `model` row by row.

    With a teacher, KL(model || teacher) is taken on `samples_per_row` responses sampled at temperature 1, of seeds from
    `decoding.seed` on: the answers themselves, unless these were decoded otherwise; both without `decoding.masked_ids`,
    as `shared_vocabulary` gives them. `rouge_tokenizer` is a name of
    `ROUGE_TOKENIZERS`. Rows without references are measured by what needs none.
    """
    if not rows:
        return []
    teacher = None if teacher is model else teacher
    scoring: dict[str, Any] = {"batch_size": batch_size, "rouge_tokenizer": rouge_tokenizer}
    job = SetEvaluation(model, tokenizer, rows, teacher=teacher, **scoring)
    losses = job.losses() if has_references(rows) else []
    kls = [] if teacher is None else [job.kl(decoding, decoding.seed + draw) for draw in range(samples_per_row)]
    return job.results(_GREEDY if decoding.is_greedy else f"seed{decoding.seed}", decoding, losses, kls)


@dataclass(frozen=True)
class SetEvaluation:
    """One model and one data set; `run` measures them."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[EncodedExample]
    file_of: Callable[[str], Path | None] = lambda part: None  # the JSONL file of a part of `parts_of`; None: in memory
    teacher: nn.Module | None = None
    metrics: Sequence[Metric] = ()
    progress: Callable[[str, int], None] = lambda what, done: None  # what is being done, and for how many rows it is
    batch_size: int = 8  # rows that are scored at a time
    rouge_tokenizer: str = DEFAULT  # a name of `ROUGE_TOKENIZERS`
    kl_seeds: int | None = None  # the KL is taken on the samples of the first so many seeds; None: of all
    _files: dict[str, ResumableLines] = field(default_factory=dict, init=False)

    def run(
        self, decoding: Decoding, seeds: Sequence[int], *, greedy: bool, model_label: str, data_label: str
    ) -> list[Evaluation]:
        """The sampled answers of all `seeds` as one evaluation and, with `greedy`, the greedy ones as another.

        At temperature 0 there are the greedy ones alone; `seeds` are then those of the samples for the KL.
        """
        losses = self.losses()
        kls = [self.kl(decoding, seed) for seed in seeds[: self.kl_seeds]] if self.teacher is not None else []
        found: list[tuple[Decoding, list[RowResult]]] = []
        if not decoding.is_greedy:
            sampled = []
            for index, seed in enumerate(seeds):
                sampled += self.results(f"seed{seed}", replace(decoding, seed=seed), losses, kls[index : index + 1])
            found.append((decoding, sampled))
        if greedy or decoding.is_greedy:
            own = replace(decoding, temperature=0.0)
            found.append((own, self.results(_GREEDY, own, losses, kls if decoding.is_greedy else [])))
        labels: dict[str, Any] = {"model": model_label, "data": data_label, "rouge_tokenizer": self._rouge_tokens.name}
        return [evaluation_of(results, how, seeds, **labels) for how, results in found]

    @cached_property
    def _rouge_tokens(self) -> RougeTokenizer:
        return rouge_tokens(self.rouge_tokenizer, self.tokenizer)

    def results(
        self, part: str, decoding: Decoding, losses: Sequence[float], kls: Sequence[Sequence[tuple[float, int]]]
    ) -> list[RowResult]:
        """Answers of one decoding with their scores. Its file ends in the order of the rows, with two of the scores."""
        lines = self._answers(part, decoding, None)
        answers = [line["token_ids"] for line in lines]
        measured: dict[str, Any] = {"losses": losses, "kls": kls, "tokenize": self._rouge_tokens.tokenize}
        results = row_results(self.tokenizer, self.rows, answers, decoding, **measured)
        for metric in self.metrics:
            scores = metric.scores([each.response for each in results], [each.references for each in results])
            for each, score in zip(results, scores, strict=True):
                each.scores[metric.label] = score
        names = ("rouge_l", "exact_match") if losses else ()
        kept = [{name: each.scores[name] for name in names} for each in results]
        self._files[part].replace([line | scores for line, scores in zip(lines, kept, strict=True)])
        return results

    def kl(self, decoding: Decoding, seed: int) -> list[tuple[float, int]]:
        """(nats, tokens) of KL(model || teacher) on each row's sample of one seed."""
        part = f"seed{seed}" if decoding.is_plain else f"seed{seed}-kl"
        lines = self._answers(part, decoding.plain(seed), self.teacher)
        return [(line["kl_nats"], len(line["token_ids"])) for line in lines]

    def losses(self) -> list[float]:
        """Nats of each row's first reference."""
        vocabulary = vocabulary_size(self.tokenizer)

        def measured(batch: list[EncodedExample], held: list[Line]) -> list[Line]:
            if len(held) == len(batch):
                return held
            nats = reference_nats(self.model, batch, vocabulary=vocabulary, batch_size=self.batch_size)
            return [_line(row, nats=value) for row, value in zip(batch, nats, strict=True)]

        return [line["nats"] for line in self._lines(_REFERENCES, _REFERENCES_AT_A_TIME, _REFERENCES, measured)]

    def _answers(self, part: str, decoding: Decoding, teacher: nn.Module | None) -> list[Line]:
        def measured(batch: list[EncodedExample], held: list[Line]) -> list[Line]:
            lines = held if len(held) == len(batch) else self._decoded(batch, decoding)
            if teacher is None or all("kl_nats" in line for line in lines):
                return lines
            samples = [line["token_ids"] for line in lines]
            vocabulary = vocabulary_without(self.tokenizer, decoding.masked_ids)
            check_heads(vocabulary, student=self.model, teacher=teacher)
            nats = kl_nats(self.model, teacher, batch, samples, vocabulary=vocabulary, batch_size=self.batch_size)
            return [{**line, "kl_nats": value} for line, value in zip(lines, nats, strict=True)]

        return self._lines(part, decoding.batch_size, f"answers ({part})", measured)

    def _decoded(self, batch: list[EncodedExample], decoding: Decoding) -> list[Line]:
        lines = []
        for row, ids in zip(batch, decode_rows(self.model, self.tokenizer, batch, decoding), strict=True):
            response = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            lines.append(_line(row, response=response, ended=ids[-1] in decoding.stop_ids, token_ids=ids))
        return lines

    def _lines(self, part: str, size: int, what: str, measured: _Measured) -> list[Line]:
        """The lines of a part in the order of the rows; its file keeps what `measured` makes of each batch."""
        if part not in self._files:
            self._files[part] = ResumableLines(self.file_of(part), check=_check)
        file, done = self._files[part], 0
        for batch in row_batches(self.rows, size):
            held = [_of_row(file, row) for row in batch if (row.row,) in file.lines]
            lines = measured(batch, held)
            if lines is not held:
                file.append(lines)
            done += len(batch)
            self.progress(what, done)
        ordered = [file.lines[row.row,] for row in self.rows]
        file.replace(ordered)
        return ordered


def _line(row: EncodedExample, **made: Any) -> Line:
    return {"row": row.row, "prompt": row.prompt, "references": list(row.references), **made}


def _of_row(file: ResumableLines, row: EncodedExample) -> Line:
    line, made_for = file.lines[row.row,], _line(row)
    if {name: line.get(name) for name in made_for} != made_for:
        held = f"{file.path} holds another prompt or other references for row {row.row}"
        raise RequestError(f"{held} than the data now have. Start from scratch with --overwrite.")
    return line


def _check(line: Line) -> None:
    """Raise ValueError for a line without an answer or a loss."""
    ids, numbers = line.get("token_ids", []), [line[name] for name in ("nats", "kl_nats") if name in line]
    are_ids = isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids)
    if not are_ids or not all(isinstance(each, int | float) for each in numbers) or not (ids or numbers):
        raise ValueError("expected an answer or a loss")
