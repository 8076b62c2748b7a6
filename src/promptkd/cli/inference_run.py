"""What commands have in common that run models without training them: tokenizers, rows, models, and their precision."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from promptkd.cli.outputs import say_rows
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.cli.trained_template import as_trained
from promptkd.data import EncodedData, encode_examples, read_columns, read_examples, resolve_template, stop_token_ids
from promptkd.data.summary import EVALUATION_FLAGS, GENERATION_FLAGS, Flags, limits_named, template_note
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.engine import check_scoring, engine_for
from promptkd.engine.devices import CPU_FOR_MPS, fastest_device, has_mps
from promptkd.errors import check_all
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
from promptkd.models.load import saved_dtype
from promptkd.models.placement import place_to_run
from promptkd.models.vocabulary import check_stop_ids
from promptkd.precision import WeightPrecision, compute_dtype, computing, model_precision, teacher_precision

_ELSEWHERE = {  # arguments of from_pretrained that have a flag, or a place, of their own
    "dtype": "Give it as --{whose}-dtype instead",
    "torch_dtype": "Give it as --{whose}-dtype instead",
    "trust_remote_code": "Give it as --trust-remote-code instead",
    "revision": "Download it (hf download NAME --revision REVISION --local-dir FOLDER) and name FOLDER",
}
_PLACING = ("device_map", "max_memory", "offload_folder")  # arguments on which no result depends


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
        _check_loading(options)
        self.teacher_dtype: str | None = None
        self.model_dtype = "float32"
        """How the weights of the model that was loaded last are held, and those of the teacher: see `held_as`."""
        self._told: dict[str, list[str]] = {}  # what was said of each data set's rows, and of their template
        self.trained_on: str | None = None
        """The template that rows were rendered with since the model was trained on it; None for another."""
        self.model_notes: list[str] = []
        """Sentences on adapters that were merged, and on weights in lower precision, which a record must hold."""

    def load_tokenizer(self, name: str, revision: str | None = None) -> Any:
        tokenizer = load_tokenizer(name, trust_remote_code=self.options.trust_remote_code, revision=revision)
        return as_trained(tokenizer, name) if self.options.template == "auto" else tokenizer

    def read_rows(
        self,
        source: str,
        tokenizer: Any,
        limit: int | None,
        most: int | None = None,
        teacher: TeacherPrompts | None = None,
        flags: Flags | None = None,
    ) -> EncodedData:
        """Rows of a data set as tokens. `most` limits the tokens of responses, which every row must then have.

        `teacher`: what a teacher alone reads of them; `flags` that set the limits, by default the command's own.
        """
        options, needed = self.options, most is not None
        template = resolve_template(options.template, tokenizer, options.chat_template_kwargs, teacher)
        longest = most if needed else options.max_completion_length
        lengths = {"max_prompt_length": options.max_prompt_length, "max_response_length": longest}
        flags = flags or (EVALUATION_FLAGS if needed else GENERATION_FLAGS)
        examples = read_examples(source, limit=limit, columns=read_columns(options.columns))
        with limits_named(flags):
            data = encode_examples(examples, tokenizer, template, need_response=needed, **lengths)
        if source not in self._told:
            if data.template is not None and "" not in self._told:
                self.trained_on = (template.text or template.name) if template.trained else None
                self._told[""] = [template_note(template, "the model")]
                say(self._told[""][0])
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

    def load_model(self, name: str) -> Any:
        """A model as --model-dtype and --model-init-kwargs say."""
        options, computes = self.options, compute_dtype(self.options.dtype, self.device)
        chooses = options.model_dtype is None and self.device.type != "cpu"
        saved = saved_dtype(name, trust_remote_code=options.trust_remote_code) if chooses else ""
        dtype = model_precision(options.model_dtype, self.device, computes=computes, saved=saved)
        settings = options.model_init_kwargs or {}
        model = self._load(name, dtype, settings, "--model-dtype bfloat16 or a quantization_config")
        held = str(model.dtype).removeprefix("torch.")
        self.model_dtype = held_as(held, settings)
        is_quantized = vars(model).get("is_quantized", False)
        if held != "float32" or is_quantized:
            alone = "" if computes == torch.bfloat16 else ", in which it computes"
            how = f"quantized, the others in {held}" if is_quantized else f"in {held}{alone}"
            self._note(f"The weights of {name} were loaded {how}.")
        return model

    def load_student(self, name: str) -> Any:
        """A student that a teacher's logits are kept for, as it will be trained."""
        return self._load(name, "float32", {}, "a smaller student")

    def load_teacher(self, name: str, revision: str | None = None) -> Any:
        dtype = teacher_precision(self.options.teacher_dtype, self.device)
        settings = self.options.teacher_model_init_kwargs or {}
        self.teacher_dtype = held_as(dtype, settings)
        less = "--teacher-dtype bfloat16 or a quantization_config"
        return self._load(name, dtype, {**settings, "revision": revision}, less)

    def _load(self, name: str, dtype: WeightPrecision, settings: Mapping[str, Any], less: str) -> Any:
        """`less` is what takes less memory. A quantized weight is not moved later: it is loaded where it will be."""
        placed = {"device_map": {"": self.device}} if "quantization_config" in settings else {}
        loaded = load_model(
            name, dtype=dtype, trust_remote_code=self.options.trust_remote_code, **{**placed, **settings}
        )
        model = place_to_run(loaded, self.device, less)
        if merged := merged_parts(model):
            self._note(f"{name} is {merged.told}.")
        check_scoring(model)
        return model

    def _note(self, text: str) -> None:
        self.model_notes.append(text)
        say(text)

    @property
    def computed(self) -> str:
        """How a model was computed with, for jobs that resume under the same; of weights in float32 nothing is said."""
        return self.precision if self.model_dtype == "float32" else f"{self.precision}, weights in {self.model_dtype}"

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
        return [f"Computed in {self.precision} on {self.device.type}.", *teacher, *self.model_notes]

    def say_peak(self) -> None:
        of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        say(f"Peak memory {gibibytes(of_device or peak_memory())}.")


def held_as(dtype: str, settings: Mapping[str, Any] | None) -> str:
    """How weights are held, in words: `dtype`, and what results depend on of the `settings` of from_pretrained."""
    kept = {name: value for name, value in (settings or {}).items() if name not in _PLACING}
    return f"{dtype}, {json.dumps(kept, sort_keys=True)}" if kept else dtype


def _check_loading(options: Any) -> None:
    """Refuse flags of weights that contradict each other, with everything that is wrong."""
    given = vars(options)
    checks = [
        (
            options.dtype == "float32" and options.model_dtype not in (None, "float32"),
            f"--model-dtype {options.model_dtype} lets the model compute in that, and --dtype float32 in float32; "
            "leave one out",
        )
    ]
    for whose, flag in (("model", "model_init_kwargs"), ("teacher", "teacher_model_init_kwargs")):
        settings = given.get(flag) or {}
        for name, advice in _ELSEWHERE.items():
            told = f"--{flag.replace('_', '-')} holds {name}: {settings.get(name)}. {advice.format(whose=whose)}"
            checks.append((name in settings, told))
    check_all("Cannot load the models so", checks)
