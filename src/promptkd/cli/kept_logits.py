"""`promptkd generate --keep-logits`: what is asked for, checked; the logits written, and what is said of them."""

import time
from types import SimpleNamespace
from typing import Any

from promptkd.cli.inference_run import InferenceRun, settled_rows
from promptkd.cli.options.generate import Options
from promptkd.cli.outputs import check_replaceable, check_writable, say_rows, sha256_of
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import EncodedData, encode_examples, read_columns, read_examples, resolve_template
from promptkd.data.kept_logits import INDEX, KeptIndex, KeptSettings, vocabulary_sha256
from promptkd.data.kept_writing import KeptWriter, bytes_per_token, held_index, predicted_bytes
from promptkd.data.summary import GENERATION_FLAGS, limits_named
from promptkd.engine import linear_head
from promptkd.errors import check_all
from promptkd.evaluation.kept_scoring import measured_error, write_logits
from promptkd.io.lock import locked
from promptkd.methods import named_method
from promptkd.models import SharedVocabulary, vocabulary_size
from promptkd.models.positions import check_rows_fit
from promptkd.models.vocabulary import check_heads
from promptkd.results import ModelRecord
from promptkd.training.ends import PairEnds
from promptkd.training.setup import take_template

_SAMPLING = ("seed", "temperature", "top_p", "top_k", "ended_only", "limit", "columns")


class LogitsRequest:
    """The logits that `promptkd generate` is asked to keep, if any."""

    def __init__(self, options: Options):
        self.options = options
        self.folder = options.out if options.score else options.out.parent / f"{options.out.stem}.logits"
        self.unfinished = options.out.parent / f"{options.out.name}.unfinished"
        """The responses of a call that is not through, by which the next one resumes."""

    def check(self) -> None:
        """Refuse flags that do not go together, and a folder that holds something else; nothing is written."""
        options = self.options
        keeps, needs = options.keep_logits is not None, "is for logits that are kept: give --keep-logits too"
        sampled = options.temperature != 1 or options.top_p != 1 or options.top_k or options.ended_only
        checks = [
            (options.score and not keeps, f"--score {needs}"),
            (options.student is not None and not keeps, f"--student {needs}"),
            (options.logits_dtype != "float16" and not keeps, f"--logits-dtype {needs}"),
            (
                options.turns != "last" and not options.score,
                "--turns is for the data's own responses: give --score",
            ),
            (
                options.score and bool(sampled),
                "--temperature, --top-p, --top-k and --ended-only are of writing responses, and --score writes none",
            ),
            (
                keeps and not options.score and self.folder == options.out,
                "--out is the JSONL file of the responses; their logits go into a folder of its name with .logits",
            ),
        ]
        check_all("Wrong flags", checks)
        if keeps:
            check_replaceable(self.folder)
            held_index(self.folder, overwrite=options.overwrite)
            check_writable(self.folder.parent, self.folder)

    @property
    def has_responses(self) -> bool:
        """Whether the responses are there: in the data, or written by the call that this one resumes."""
        options = self.options
        if options.score or options.keep_logits is None or options.overwrite or self.unfinished.exists():
            return options.score
        if not options.out.is_file() or not (self.folder / INDEX).is_file():
            return False
        return KeptIndex.read(self.folder).settings.data_sha256 == sha256_of(str(options.out))

    def say_most(self, data: EncodedData, model: Any) -> None:
        """Before responses are written: how much room their logits may take."""
        options = self.options
        if options.keep_logits is not None:
            vocabulary = model.config.get_text_config().vocab_size
            kept = KeptSettings.model_construct(
                kept=min(options.keep_logits, vocabulary), dtype=options.logits_dtype, vocabulary=vocabulary
            )
            rows = len(data.examples)
            most = _size(predicted_bytes(rows, rows * options.max_completion_length, kept))
            say(f"The logits of {rows:,} responses will take up to {most} in {self.folder}.")

    def keep(self, job: InferenceRun, teacher_tokenizer: Any, teacher: Any, record: ModelRecord) -> None:
        """Write, or go on writing, the teacher's logits at the responses; measure and say what is lost by them."""
        options = self.options
        tokenizer = job.load_tokenizer(options.student) if options.student else teacher_tokenizer
        args: Any = SimpleNamespace(
            template=options.template, end_token="teacher", trust_remote_code=options.trust_remote_code
        )
        take_template(args, tokenizer, teacher_tokenizer, options.model)
        shared = job.share(tokenizer, teacher_tokenizer) if options.student else None
        shared = shared or SharedVocabulary(vocabulary_size(tokenizer))
        check_heads(shared, teacher=teacher)
        ends = PairEnds(args, named_method("kd"), shared, tokenizer, teacher_tokenizer, teacher.generation_config)
        for note in ends.settle_with(options.student or teacher, [])[0]:
            say(note)
        source = options.data if options.score else str(options.out)
        data = self._encoded(source, tokenizer, args.template)
        shared.check(data.examples, source)
        check_rows_fit("model", teacher, data.examples, 0)
        wanted: int = options.keep_logits or 0
        settings = KeptSettings(
            teacher=options.model,
            teacher_sha256=record.sha256,
            teacher_parameters=record.parameters,
            precision=job.computed,
            kept=min(wanted, shared.size),
            dtype=options.logits_dtype,
            vocabulary=shared.size,
            masked=sorted({*shared.masked, *_absent(teacher, shared.size)}),
            vocabulary_sha256=vocabulary_sha256(tokenizer),
            ends=ends.in_order,
            data=source,
            data_sha256=sha256_of(source),
            rows=self._how_rows(),
            sampling=None if options.score else self._sampling(),
            student=options.student or "",
        )
        if wanted > shared.size:
            say(f"The vocabulary has {shared.size:,} tokens: all are kept.")
        student = job.load_student(options.student) if options.student else None
        with locked(self.folder, folder=True), job.computing():
            writer = KeptWriter(self.folder, settings, data.examples, overwrite=options.overwrite)
            self._write(writer, teacher, student, data)

    def _write(self, writer: KeptWriter, teacher: Any, student: Any, data: EncodedData) -> None:
        index, rows = writer.index, len(writer.rows)
        if index.error is not None:
            say(f"{self.folder} is finished already: {rows:,} rows. --overwrite keeps them anew.")
            return
        size, of_token = _size(writer.bytes), bytes_per_token(index.settings)
        say(f"The logits of {rows:,} rows, {index.tokens:,} response tokens at {of_token} bytes, take {size}.")
        if index.shards:
            done = sum(shard.rows for shard in index.shards)
            say(f"{done:,} of {rows:,} rows are kept already; going on with the others.")
        writer.begin()
        batch_size, left = settled_rows(self.options.batch_size), [row for part in writer.left for row in part]
        started = time.perf_counter()
        write_logits(teacher, writer, batch_size=batch_size, progress=progress_lines("Scoring", rows))
        speed = sum(len(row.response_ids) for row in left) / (time.perf_counter() - started)
        scored: dict[str, Any] = {"batch_size": batch_size, "student": student}
        error = measured_error(teacher, data.examples, index.settings, **scored)
        writer.finish(error)
        written = sum(shard.bytes for shard in index.shards)
        say(f"{rows:,} rows in {self.folder}, {_size(written)}, scored at {speed:.0f} response tokens per second.")
        for line in error_lines(error, index.settings):
            say(line)

    def _encoded(self, source: str, tokenizer: Any, template: str) -> EncodedData:
        """The rows as `promptkd distill` will have them."""
        options = self.options
        limit, columns = (options.limit, read_columns(options.columns)) if options.score else (None, None)
        with limits_named(GENERATION_FLAGS):
            data = encode_examples(
                read_examples(source, limit=limit, columns=columns),
                tokenizer,
                resolve_template(template, tokenizer, options.chat_template_kwargs),
                max_prompt_length=options.max_prompt_length,
                max_response_length=options.max_completion_length,
                turns=options.turns,
            )
        say_rows(source, data, GENERATION_FLAGS)
        return data

    def _how_rows(self) -> dict[str, Any]:
        options = self.options
        names = ("template", "chat_template_kwargs", "max_prompt_length", "max_completion_length", "turns")
        columns = read_columns(options.columns) if options.score else None
        return {name: vars(options)[name] for name in names} | {"columns": columns}

    def _sampling(self) -> dict[str, Any]:
        options = self.options
        of_data = {"data": options.data, "data_sha256": sha256_of(options.data)}
        return {name: vars(options)[name] for name in _SAMPLING} | of_data


def error_lines(error: dict[str, float], settings: KeptSettings) -> list[str]:
    """What is lost by keeping so few tokens, in sentences."""
    on = f"Measured on {error['rows']:.0f} rows, {error['tokens']:.0f} tokens"
    mean, most = f"{error['rest_mass_mean']:.3%} on average", f"{error['rest_mass_max']:.2%} at most"
    mass = f"{mean}, {error['rest_mass_p95']:.2%} at the 95th percentile, {most}"
    kept = f"{settings.kept} of {settings.vocabulary:,} tokens"
    lost = f"{error['entropy_lost']:.4f} of {error['entropy']:.4f} nats of its entropy are not seen"
    rounding = f"{settings.dtype} costs a KL of {error['rounding_kl']:.1e} nats"
    lines = [f"{on}: the teacher's mass outside of {kept} is {mass}; {lost}; {rounding}."]
    for name, title in (("forward_kl", "Forward KL"), ("adaptive_kl", "Adaptive KL")):
        if name in error:
            full, ours, gap = (error[each] for each in (name, f"{name}_kept", f"{name}_gap"))
            told = f"{title} to {settings.student}: {full:.4f} nats per token over all tokens, {ours:.4f} as kept"
            lines.append(f"{told}; |difference| {gap:.1e} on average.")
    return lines


def _absent(teacher: Any, size: int) -> list[int]:
    """Ids whose column the teacher's head does not have, by a bias of -inf."""
    head = linear_head(teacher)
    if head is None or head.bias is None:
        return []
    return (head.bias[:size] == float("-inf")).nonzero().flatten().tolist()


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
