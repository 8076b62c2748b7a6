"""One model on one data set, over seeds and greedily; what was decoded or measured stays on the disk, batch by batch.

Rows go into batches by the length of their prompts alone. A later run meets the same batches, does those that lack a
row, and so ends with what an undisturbed run would have ended with, bit for bit on the same machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError
from promptkd.evaluation.hub_metrics import HubMetric
from promptkd.evaluation.likelihood import kl_nats, reference_nats
from promptkd.evaluation.measure import (
    REFERENCES_AT_A_TIME,
    decode_rows,
    evaluation_of,
    row_batches,
    row_results,
)
from promptkd.generation import Decoding
from promptkd.io.jsonl import ResumableLines
from promptkd.models import vocabulary_size
from promptkd.results import Evaluation, RowResult

Line = dict[str, Any]
_GREEDY, _REFERENCES = "greedy", "references"


def parts_of(decoding: Decoding, seeds: Sequence[int], *, greedy: bool, teacher: bool) -> list[str]:
    """Names of what is kept of a set, a file each: "seed10", "greedy", "references" (their losses) and "seed10-kl".

    The last holds samples at temperature 1 for the KL to a teacher, where the answers are decoded otherwise.
    """
    parts = [] if decoding.is_greedy else [f"seed{seed}" for seed in seeds]
    parts += [_GREEDY] if greedy or decoding.is_greedy else []
    parts += [_kl_part(decoding, seed) for seed in seeds] if teacher and not decoding.is_plain else []
    return [*parts, _REFERENCES]


def _kl_part(decoding: Decoding, seed: int) -> str:
    return f"seed{seed}" if decoding.is_plain else f"seed{seed}-kl"


@dataclass(frozen=True)
class SetEvaluation:
    """One model and one data set; `run` measures them."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[EncodedExample]
    file_of: Callable[[str], Path]
    """From a part, as `parts_of` names it, to the JSONL file that keeps it."""
    teacher: nn.Module | None = None
    metrics: Sequence[HubMetric] = ()
    progress: Callable[[str, int], None] | None = None
    """Called with what is being done and for how many rows it is done."""

    def run(
        self, decoding: Decoding, seeds: Sequence[int], *, greedy: bool, model_label: str, data_label: str
    ) -> list[Evaluation]:
        """The sampled answers of all `seeds` as one evaluation and, with `greedy`, the greedy ones as another.

        At temperature 0 there are the greedy ones alone; `seeds` are then those of the samples for the KL.
        """
        losses = self._losses()
        kls = {seed: self._kl(decoding, seed) for seed in seeds} if self.teacher is not None else {}
        found: list[tuple[Decoding, list[RowResult]]] = []
        if not decoding.is_greedy:
            sampled = []
            for seed in seeds:
                own = replace(decoding, seed=seed)
                sampled += self._results(f"seed{seed}", own, losses, [kls[seed]] if kls else [])
            found.append((decoding, sampled))
        if greedy or decoding.is_greedy:
            own = replace(decoding, temperature=0.0)
            found.append((own, self._results(_GREEDY, own, losses, list(kls.values()) if decoding.is_greedy else [])))
        return [evaluation_of(results, how, seeds, model=model_label, data=data_label) for how, results in found]

    def _results(
        self, part: str, decoding: Decoding, losses: Sequence[float], kls: Sequence[Sequence[tuple[float, int]]]
    ) -> list[RowResult]:
        """Answers of one decoding with their scores. Its file ends in the order of the rows, with two of the scores."""
        lines = self._answers(part, decoding, None)
        answers = [line["token_ids"] for line in lines]
        results = row_results(self.tokenizer, self.rows, answers, decoding, losses=losses, kls=kls)
        for metric in self.metrics:
            scores = metric.scores([each.response for each in results], [each.references for each in results])
            for each, score in zip(results, scores, strict=True):
                each.scores[metric.label] = score
        for line, each in zip(lines, results, strict=True):
            line |= {name: each.scores[name] for name in ("rouge_l", "exact_match")}
        ResumableLines(self.file_of(part)).replace(lines)
        return results

    def _kl(self, decoding: Decoding, seed: int) -> list[tuple[float, int]]:
        """(nats, tokens) of KL(model || teacher) on each row's sample of one seed."""
        part = _kl_part(decoding, seed)
        lines = self._answers(part, decoding.plain(seed), self.teacher)
        ResumableLines(self.file_of(part)).replace(lines)
        return [(line["kl_nats"], len(line["token_ids"])) for line in lines]

    def _answers(self, part: str, decoding: Decoding, teacher: nn.Module | None) -> list[Line]:
        """A line for each row: the answer and, with a teacher, its KL. What the file lacks is made and appended."""
        file = ResumableLines(self.file_of(part))
        for batch, held in self._batches(file, decoding.batch_size, part):
            lines = held if len(held) == len(batch) else self._decoded(batch, decoding)
            if teacher is not None and not all("kl_nats" in line for line in lines):
                samples = [line["token_ids"] for line in lines]
                nats = kl_nats(self.model, teacher, self.tokenizer, batch, samples)
                lines = [{**line, "kl_nats": value} for line, value in zip(lines, nats, strict=True)]
            if lines is not held:
                file.append(lines)
        return [dict(file.lines[row.row,]) for row in self.rows]

    def _decoded(self, batch: list[EncodedExample], decoding: Decoding) -> list[Line]:
        answers = decode_rows(self.model, self.tokenizer, batch, decoding)
        return [
            _line(
                row,
                response=self.tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
                ended=token_ids[-1] in decoding.stop_ids,
                token_ids=token_ids,
            )
            for row, token_ids in zip(batch, answers, strict=True)
        ]

    def _losses(self) -> list[float]:
        """Nats of each row's first reference."""
        file = ResumableLines(self.file_of(_REFERENCES))
        for batch, held in self._batches(file, REFERENCES_AT_A_TIME, _REFERENCES):
            if len(held) < len(batch):
                nats = reference_nats(self.model, batch, vocabulary=vocabulary_size(self.tokenizer))
                file.append(_line(row, nats=value) for row, value in zip(batch, nats, strict=True))
        lines = [file.lines[row.row,] for row in self.rows]
        file.replace(lines)
        return [line["nats"] for line in lines]

    def _batches(self, file: ResumableLines, size: int, part: str) -> Iterator[tuple[list[EncodedExample], list[Line]]]:
        """Rows of like length, the longest first, with the lines that the file holds of them."""
        done = 0
        for places in row_batches(self.rows, size):
            batch = [self.rows[place] for place in places]
            held = [_checked(file, row) for row in batch if (row.row,) in file.lines]
            yield batch, held
            done += len(batch)
            if self.progress is not None:
                self.progress(part if part == _REFERENCES else f"answers ({part})", done)


def _line(row: EncodedExample, **made: Any) -> Line:
    return {"row": row.row, "prompt": row.prompt, "references": list(row.references), **made}


def _checked(file: ResumableLines, row: EncodedExample) -> Line:
    """The line of `row`, which must have been made for the very same row."""
    line = file.lines[row.row,]
    made_for = _line(row)
    if {name: line.get(name) for name in made_for} != made_for:
        raise RequestError(
            f"{file.path} holds another prompt or other references for row {row.row} than the data now have. "
            "Begin anew with --overwrite."
        )
    ids, numbers = line.get("token_ids", []), [line[name] for name in ("nats", "kl_nats") if name in line]
    if (
        not isinstance(ids, list)
        or not all(type(each) is int and each >= 0 for each in ids)
        or not all(isinstance(each, int | float) for each in numbers)
        or not (ids or numbers)
    ):
        raise RequestError(f"{file.path}, row {row.row}: holds no answer or loss. Begin anew with --overwrite.")
    return line
