"""What commands have in common that run models without training them: tokenizers, rows, models, and their precision."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from promptkd.cli.terminal import quiet_libraries, say
from promptkd.data import EncodedData, encode_examples, read_examples, stop_token_ids
from promptkd.engine import check_scoring, engine_for
from promptkd.generation import Decoding
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import load_model, load_tokenizer, vocabulary_size
from promptkd.precision import WeightPrecision, compute_dtype, computing, teacher_precision


def fastest_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settled_rows(batch_size: int | None) -> int:
    """How many rows --batch-size comes to: as many as in training on this device, unless it says so."""
    return engine_for(fastest_device()).decode_rows if batch_size is None else batch_size


def sampling(options: Any) -> dict[str, Any]:
    """The options of `options.common.Sampling`, for a `Decoding`."""
    return {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}


class InferenceRun:
    """Tokenizers, rows and models as a command's options ask for them, on the fastest device there is."""

    def __init__(self, options: Any):
        quiet_libraries()
        self.options, self.device = options, fastest_device()
        self.precision = "float32"
        self.teacher_dtype: WeightPrecision | None = None

    def load_tokenizer(self, name: str) -> Any:
        return load_tokenizer(name, trust_remote_code=self.options.trust_remote_code)

    def read_rows(
        self, source: str, tokenizer: Any, *, limit: int | None, max_response_length: int | None = None
    ) -> EncodedData:
        """The rows of a data set as tokens; with a limit on responses each row must have one."""
        longest = self.options.max_completion_length if max_response_length is None else max_response_length
        return encode_examples(
            read_examples(source, limit=limit),
            tokenizer,
            self.options.template,
            max_prompt_length=self.options.max_prompt_length,
            max_response_length=longest,
            need_response=max_response_length is not None,
        )

    def load_model(self, name: str, dtype: WeightPrecision = "float32") -> Any:
        """A model that can be scored, with weights of `dtype`."""
        model = load_model(name, dtype=dtype, trust_remote_code=self.options.trust_remote_code).to(self.device)
        check_scoring(model)
        return model

    def load_teacher(self, name: str) -> Any:
        """A model with weights in the precision that --teacher-dtype comes to."""
        self.teacher_dtype = teacher_precision(self.options.teacher_dtype, self.device)
        return self.load_model(name, self.teacher_dtype)

    def decoding(self, tokenizer: Any, model: Any, **settings: Any) -> Decoding:
        """How `model` answers rows, by the options and further fields of `Decoding`."""
        return Decoding(
            max_new_tokens=self.options.max_completion_length,
            stop_ids=stop_token_ids(tokenizer, model.generation_config, self.options.template),
            vocabulary=vocabulary_size(tokenizer),
            batch_size=settled_rows(self.options.batch_size),
            **settings,
        )

    def settle_precision(self) -> None:
        """Choose, and say, the precision that --dtype comes to on this device; before, it is float32."""
        self.precision = str(compute_dtype(self.options.dtype, self.device)).removeprefix("torch.")
        say(f"Computing in {self.precision} on {self.device.type}.")

    def computing(self) -> AbstractContextManager[object]:
        """What models with float32 weights run in, to compute in that precision."""
        return computing(self.device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision])

    def precision_notes(self) -> list[str]:
        """What the record says of it; its config holds what was asked for, the same on every machine."""
        teacher = f"The teacher's weights were loaded in {self.teacher_dtype}."
        return [f"Computed in {self.precision} on {self.device.type}.", *([teacher] if self.teacher_dtype else [])]

    def say_peak(self) -> None:
        """Of the GPU where it was used, else of the process."""
        of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        say(f"Peak memory {gibibytes(of_device or peak_memory())}.")
