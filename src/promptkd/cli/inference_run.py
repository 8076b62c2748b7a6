"""What commands have in common that run models without training them: tokenizers, rows, models, and their precision."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from promptkd.cli.outputs import say_rows
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.data import EncodedData, encode_examples, read_columns, read_examples, resolve_template, stop_token_ids
from promptkd.data.summary import EVALUATION_FLAGS, FLAGS, GENERATION_FLAGS, limits_named
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.engine import check_scoring, engine_for
from promptkd.engine.devices import CPU_FOR_MPS, fastest_device, has_mps
from promptkd.generation import Decoding
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import (
    SharedVocabulary,
    load_model,
    load_tokenizer,
    merged_parts,
    shared_vocabulary,
    vocabulary_size,
)
from promptkd.models.vocabulary import check_stop_ids
from promptkd.precision import WeightPrecision, compute_dtype, computing, teacher_precision


def settled_rows(batch_size: int | None) -> int:
    """How many rows --batch-size comes to: as many as in training on this device, unless it says so."""
    return engine_for(fastest_device()).decode_rows if batch_size is None else batch_size


def sampling(options: Any) -> dict[str, Any]:
    return {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}


class InferenceRun:
    """Tokenizers, rows and models as a command's options ask for them, on the fastest device there is."""

    def __init__(self, options: Any):
        quiet_libraries()
        self.options, self.device, self.precision = options, fastest_device(), "float32"
        self.teacher_dtype: WeightPrecision | None = None
        self._told: dict[str, list[str]] = {}  # what was said of each data set's rows
        self.merged: list[str] = []
        """Sentences on adapters that were merged into the models, which a record must hold."""

    def load_tokenizer(self, name: str, revision: str | None = None) -> Any:
        return load_tokenizer(name, trust_remote_code=self.options.trust_remote_code, revision=revision)

    def read_rows(
        self,
        source: str,
        tokenizer: Any,
        limit: int | None,
        most: int | None = None,
        teacher: TeacherPrompts | None = None,
    ) -> EncodedData:
        """Rows of a data set as tokens. `most` limits the tokens of responses, which every row must then have.

        `teacher`: what a teacher alone reads of them.
        """
        options, needed = self.options, most is not None
        template = resolve_template(options.template, tokenizer, options.chat_template_kwargs, teacher)
        longest = most if needed else options.max_completion_length
        lengths = {"max_prompt_length": options.max_prompt_length, "max_response_length": longest}
        flags = FLAGS if teacher else EVALUATION_FLAGS if needed else GENERATION_FLAGS
        examples = read_examples(source, limit=limit, columns=read_columns(options.columns))
        with limits_named(flags):
            data = encode_examples(examples, tokenizer, template, need_response=needed, **lengths)
        if source not in self._told:
            self._told[source] = say_rows(source, data, flags)
        return data

    @property
    def row_notes(self) -> list[str]:
        """For the record: what a reader must know of the rows."""
        return [note for notes in self._told.values() for note in notes]

    def share(self, tokenizer: Any, teacher: Any) -> SharedVocabulary:
        """The tokens on which a model and its teacher are compared; `RequestError` if they do not share the end."""
        shared = shared_vocabulary(tokenizer, teacher)
        template = resolve_template(self.options.template, tokenizer, self.options.chat_template_kwargs)
        shared.check_end(template.end_token_id)
        return shared

    def load_model(self, name: str, dtype: WeightPrecision = "float32", revision: str | None = None) -> Any:
        of_files = {"trust_remote_code": self.options.trust_remote_code, "revision": revision}
        model = load_model(name, dtype=dtype, **of_files).to(self.device)
        if merged := merged_parts(model):
            self.merged.append(f"{name} is {merged.told}.")
            say(self.merged[-1])
        check_scoring(model)
        return model

    def load_teacher(self, name: str, revision: str | None = None) -> Any:
        self.teacher_dtype = teacher_precision(self.options.teacher_dtype, self.device)
        return self.load_model(name, self.teacher_dtype, revision)

    def decoding(self, tokenizer: Any, model: Any, **settings: Any) -> Decoding:
        stop_ids = stop_token_ids(tokenizer, model.generation_config, self.options.template)
        check_stop_ids("model", model, stop_ids)
        return Decoding(
            max_new_tokens=self.options.max_completion_length,
            stop_ids=stop_ids,
            vocabulary=vocabulary_size(tokenizer),
            batch_size=settled_rows(self.options.batch_size),
            **settings,
        )

    def settle_precision(self) -> None:
        """Choose, and say, the precision that --dtype comes to on this device; before, it is float32."""
        self.precision = str(compute_dtype(self.options.dtype, self.device)).removeprefix("torch.")
        say(f"Computing in {self.precision} on {self.device.type}.")
        if has_mps():
            say(CPU_FOR_MPS)

    def computing(self) -> AbstractContextManager[object]:
        return computing(self.device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision])

    def precision_notes(self) -> list[str]:
        teacher = [f"The teacher's weights were loaded in {self.teacher_dtype}."] if self.teacher_dtype else []
        return [f"Computed in {self.precision} on {self.device.type}.", *teacher, *self.merged]

    def say_peak(self) -> None:
        of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        say(f"Peak memory {gibibytes(of_device or peak_memory())}.")
