"""`promptkd explain-prompt`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from promptkd.cli.inference_run import InferenceRun
from promptkd.cli.options.explain_prompt import Options
from promptkd.cli.outputs import check_output, data_record, label_of
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.prompt_run import PromptRun
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import read_columns, read_examples
from promptkd.data.summary import FLAGS
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.errors import RequestError
from promptkd.evaluation import Scoring
from promptkd.evaluation.prompt_explanation import Start, explained_vectors, kl_by_position
from promptkd.generation import generate, row_seeds
from promptkd.models import SoftPrompt, check_positions, model_record, vocabulary_size
from promptkd.models.soft_prompt import start_tokens
from promptkd.models.vocabulary import check_heads
from promptkd.record_parts import PromptAnswer, PromptExplanation
from promptkd.report.prompts import explanation_text
from promptkd.results import Results
from promptkd.training.teachers import role_of

_WITH_CONTEXT = (
    "The teacher, with the prompt and without, reads the rows' context (teacher_prompt) before the requests, as in "
    "training; the student reads the requests alone."
)
_WITHOUT_CONTEXT = (
    "In training the teacher read a context of its own (teacher_prompt). Here it reads the requests alone, so its "
    "answers and KLs are not those of training."
)


def run(options: Options, training: dict[str, Any]) -> None:
    explained = PromptRun(options.run)
    out = (options.out or options.run / "explain-prompt") / "results.json"
    check_output(out, overwrite=options.overwrite)
    job = _ExplainRun(options, explained)
    for name in explained.prompts:
        job.results.prompts.append(job.explain(name))
    out.parent.mkdir(parents=True, exist_ok=True)
    job.results.write(out)
    for each in job.results.prompts:
        print(explanation_text(each))
    records = options.run if options.out is None else f"{options.run} {out}"  # a run's own record has a place
    say(f"The record is {out}. `promptkd report {records} --out report.html` shows it on the run's page.")
    job.say_peak()


class _ExplainRun(InferenceRun):
    """The student and its requests, as the run read them; then one teacher after the other."""

    def __init__(self, options: Options, explained: PromptRun):
        self.run, of_run = explained, explained.setting
        template = of_run("template", "auto")
        settings = {
            "template": "auto" if template == "teacher" else template,  # which the student's tokenizer was given
            "chat_template_kwargs": of_run("chat_template_kwargs", None),
            "columns": of_run("columns", None) if options.data is None else None,
            "max_prompt_length": of_run("max_prompt_length", 256),
            "max_completion_length": of_run("max_completion_length", of_run("max_response_length", 256)),
            "teacher_dtype": options.teacher_dtype or of_run("teacher_dtype", None),
            "teacher_model_init_kwargs": explained.teacher_settings(options.teacher_model_init_kwargs),
        }
        super().__init__(SimpleNamespace(**(vars(options) | settings)))
        self.teachers = explained.teachers(options.teacher)
        source = explained.data(options.data)
        self.tokenizer = self.load_tokenizer(str(options.run))
        self.revision = explained.revision
        for teacher in self.teachers.values():
            self.share(self.tokenizer, self.load_tokenizer(teacher, self.revision))
        most = options.limit if options.data else min(options.limit, of_run("eval_limit", options.limit))
        most_read = max(most, options.rows)
        contexts = self._contexts(source, most_read)
        limits = FLAGS if contexts else None  # those of the run
        data = self.read_rows(source, self.tokenizer, most_read, teacher=contexts, flags=limits)
        self.has_contexts = data.contexts > 0
        self.rows, self.shown = data.examples[:most], data.examples[: options.rows]
        self.settle_precision()
        self.student = self.load_model(str(options.run))
        notes = [
            f"KL by position is measured on what the student itself writes for {len(self.rows)} requests, sampled at "
            f"temperature 1 (seed {options.seed}); the answers side by side are greedy.",
            *self.row_notes,
        ]
        if self.has_contexts:
            notes.append(_WITH_CONTEXT)
        elif any(model.context for model in explained.record.models.values()):
            notes.append(_WITHOUT_CONTEXT)
            say(_WITHOUT_CONTEXT)
        self.results = Results(kind="explain-prompt", config=merged_config(options, {}), notes=notes)
        self.results.models["student"] = model_record(options.run, self.student)
        self.results.data[label_of(source)] = data_record(source, data)

    def _contexts(self, source: str, most: int) -> TeacherPrompts | None:
        """What the teacher reads beside the rows, as in training; None if they lack what the run's text names."""
        prompts = TeacherPrompts(
            self.run.setting("teacher_prompt", None), self.run.setting("max_teacher_prompt_length", 1024)
        )
        for example in read_examples(source, limit=most, columns=read_columns(self.options.columns)):
            try:
                prompts.context(example)
            except RequestError as error:
                say(f"{source}: the context is left out, since not every row has what it is made of. {error}")
                return None
        return prompts

    def explain(self, name: str) -> PromptExplanation:
        folder, options = self.run.prompts[name], self.options
        place = self.teachers[name]
        tokenizer = self.load_tokenizer(place, self.revision)
        shared = self.share(self.tokenizer, tokenizer)
        shared.check(self.rows, "requests")
        teacher, vectors = self.load_teacher(place, self.revision), SoftPrompt.load(folder)().detach()
        width = teacher.get_input_embeddings().weight.shape[1]
        if vectors.shape[1] != width:
            widths = f"{vectors.shape[1]} numbers, and the teacher's embeddings {width}"
            raise RequestError(f"The vectors in {folder} have {widths}. Give the teacher that they were trained for.")
        check_heads(shared, student=self.student, teacher=teacher)
        rows = [*self.rows, *self.shown]
        read = [row.for_teacher() for row in rows]
        for role, model, own, extra in (("student", self.student, rows, 0), ("teacher", teacher, read, len(vectors))):
            longest = max(len(row.prompt_ids) for row in own)
            check_positions(role, model, longest, options.max_completion_length, soft_prompt=extra)
        record = self.results.models[role_of(name)] = model_record(place, teacher, revision=self.revision)
        if self.has_contexts:
            known_teacher = self.run.record.models.get(role_of(name))
            record.context = (known_teacher.context if known_teacher else "") or "the rows' column teacher_prompt"
        known = self.results.notes
        known += [note for note in (*shared.notes, *self.precision_notes()) if note not in known]
        prompt = vectors.to(teacher.get_input_embeddings().weight.device)
        explained = explained_vectors(
            vectors,
            teacher,
            tokenizer,
            vocabulary_size(tokenizer),
            folder=folder.relative_to(self.run.folder).as_posix(),
            start=self._start(teacher, tokenizer, len(vectors)),
        )
        limits = {"vocabulary": shared.size, "masked_ids": shared.masked}
        with self.computing():
            explained.answers = self._answers(teacher, prompt, limits)
            samples = self._samples(limits)
            with self._timed("KL by position"):
                prompts, contexts = zip(*((row.prompt_ids, row.teacher_prompt_ids) for row in self.rows), strict=True)
                scoring = Scoring(prompt, shared, contexts=contexts)
                explained.kl = kl_by_position(self.student, teacher, prompts, samples, scoring)
        return explained

    def _start(self, teacher: Any, tokenizer: Any, length: int) -> Start | None:
        how = self.run.start()
        if how is None:
            return None
        made = SoftPrompt.create(teacher, tokenizer, length=length, **how)
        ids = start_tokens(tokenizer, length=length, start=how["start"], text=how["text"])
        return Start(made.start.cpu(), ids)

    def _answers(self, teacher: Any, prompt: Tensor, limits: dict[str, Any]) -> list[PromptAnswer]:
        """Greedy answers of the teacher without and with the prompt, and of the student, in texts."""
        if not self.shown:
            return []
        texts = {}
        asked = {"plain": (teacher, None), "prompted": (teacher, prompt), "student": (self.student, None)}
        for who, (model, vectors) in asked.items():
            with self._timed(f"answers, {who}"):
                decoding = replace(self.decoding(self.tokenizer, model, temperature=0.0), **limits)
                rows = self.shown if who == "student" else [row.for_teacher() for row in self.shown]
                size, requests = decoding.batch_size, [row.prompt_ids for row in rows]
                written = generate(model, requests, decoding, prompt=vectors, batch_size=size)
            texts[who] = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        return [
            PromptAnswer(
                row=row.row,
                prompt=row.prompt,
                request=list(row.request),
                **{who: answers[at] for who, answers in texts.items()},
            )
            for at, row in enumerate(self.shown)
        ]

    def _samples(self, limits: dict[str, Any]) -> list[list[int]]:
        """What the student writes at temperature 1, a response per row."""
        seeds = row_seeds(self.options.seed, max(row.row for row in self.rows) + 1)
        decoding = replace(self.decoding(self.tokenizer, self.student, temperature=1.0), **limits)
        tell = partial(progress_lines("Sampling the student", len(self.rows)), "responses")
        prompts, own = [row.prompt_ids for row in self.rows], [seeds[row.row] for row in self.rows]
        with self._timed("sampling the student"):
            return generate(self.student, prompts, decoding, seeds=own, batch_size=decoding.batch_size, on_batch=tell)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.results.timings[what] = time.perf_counter() - started
