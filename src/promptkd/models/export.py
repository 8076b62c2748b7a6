"""A model as serving tools load it, read back from the disk and compared before anybody relies on it.

What was written must be the model with its weights rounded to the chosen type: with the same weights in float32 the
logits agree up to the order of additions, so the comparison needs no allowance for the rounding and sees small errors.
What the rounding itself changes is measured beside it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.errors import PromptKDError, RequestError
from promptkd.models.gguf_file import stored_type, why_not_gguf, write_gguf
from promptkd.models.load import clear_load_errors, convert_gguf, load_model, load_tokenizer, resolve_model

__all__ = ["Comparison", "export_gguf", "export_safetensors", "plain_model"]

TOLERANCE = 1e-4
"""Most that logits may differ, as a share of the largest."""
SAMPLE = 128
"""Most tokens that logits are compared on."""
TEXTS = (
    "The quick brown fox's 12.5 % of 1999, isn't it? IT'S 3,141,592!",
    "  two  spaces\n\tand a tab\n\n1. One\n\n  2) Two   3\r\n",
    "naïve café – 日本語 ١٢٣ 🙂👩‍💻 Ελλάδα",
    "def f(x):\n    return {x: [0x1F, 'a_b']}  # ok\n",
)


@dataclass(frozen=True)
class Comparison:
    """The model that was read back against the one that was written."""

    tokens: int
    """How many tokens the logits were compared on."""
    difference: float
    """Largest difference of a logit from the model's with rounded weights."""
    limit: float
    """Largest difference that passes."""
    rounding: float
    """Largest difference of a logit that the rounding of the weights makes."""
    same_choices: int
    """Of `tokens`: after how many the rounded model finds the same token the most probable."""
    texts: int
    """How many texts were cut into the same tokens."""


def plain_model(name: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 with LoRA merged into its weights, and its tokenizer.

    Raises:
        RequestError: if there is no such model, or it has an adapter that cannot be merged.
    """
    folder = Path(resolve_model(name))
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        with clear_load_errors(folder):
            settings = PeftConfig.from_pretrained(str(folder))
        if settings.is_prompt_learning:
            raise RequestError(f"{name} is a soft prompt, which is no part of a model's weights. Give the student.")
        base = load_model(str(settings.base_model_name_or_path), trust_remote_code=trust_remote_code)
        with clear_load_errors(folder):
            model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    else:
        model = load_model(name, trust_remote_code=trust_remote_code)
    if any(isinstance(each, BaseTunerLayer) for each in model.modules()):
        raise RequestError(f"{name} has an adapter that is merged from a local folder only. Download it and give that.")
    return model.eval(), tokenizer


def export_safetensors(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Comparison:
    """Write a folder that transformers and vLLM load. `model` is used up: it is left in `dtype`.

    Raises:
        RequestError: for weights that `dtype` cannot hold.
        PromptKDError: if what was read back is not what was written.
    """
    check = _Check(model, tokenizer)
    _round(model, {name: dtype for name, _ in model.named_parameters()})
    check.round()
    model.config.use_cache = True  # training may have switched it off
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return check.compare(folder, trust_remote_code=trust_remote_code)


def export_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, *, title: str
) -> Comparison:
    """Write a GGUF file that llama.cpp loads. `model` is used up: its weights are left rounded to `dtype`.

    Raises:
        RequestError: for a model that `write_gguf` does not know, or weights that `dtype` cannot hold.
        PromptKDError: if what was read back is not what was written.
    """
    problems = why_not_gguf(model, tokenizer)
    if problems:
        raise RequestError(
            f"This model cannot be written as GGUF here: {'; '.join(problems)}. llama.cpp's own converter knows more "
            "models: export to safetensors, then run `python convert_hf_to_gguf.py FOLDER --outfile FILE.gguf` from a "
            "checkout of llama.cpp."
        )
    check = _Check(model, tokenizer)
    _round(model, {name: stored_type(name, weight, dtype) for name, weight in model.named_parameters()})
    check.round()
    write_gguf(file, model, tokenizer, dtype, title)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        with _reading_back():
            convert_gguf(file, Path(folder))
        return check.compare(Path(folder))


@contextmanager
def _reading_back() -> Iterator[None]:
    """A request is not wrong because of what this module wrote."""
    try:
        yield
    except RequestError as error:
        raise PromptKDError(f"What was written cannot be read back, and nothing is kept: {error}") from error


class _Check:
    """What the model and its tokenizer do, kept to be compared with what is read back."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        ids = [index for text in TEXTS for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
        self.ids = torch.tensor([ids[:SAMPLE]], device=model.device)
        self.exact = self.expected = _logits(model, self.ids)

    def round(self) -> None:
        """From here on the model's weights are rounded."""
        self.expected = _logits(self.model, self.ids)

    def compare(self, folder: Path, *, trust_remote_code: bool = False) -> Comparison:
        """Read the model in `folder`. Raises `PromptKDError` if it is another."""
        with _reading_back():
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
            read = load_model(folder, trust_remote_code=trust_remote_code)
        self._compare_tokenizer(tokenizer)
        limit = TOLERANCE * max(1.0, float(self.expected.abs().max()))
        difference = float((_logits(read, self.ids) - self.expected).abs().max())
        if not difference <= limit:  # NaN, too
            raise PromptKDError(
                f"What was written is not the model: read back, its logits differ by up to {difference:.2g}, and "
                f"{limit:.2g} was expected at most. Nothing is kept. Please report this with the model's config.json."
            )
        same = (self.exact.argmax(-1) == self.expected.argmax(-1)).sum()
        rounding = float((self.exact - self.expected).abs().max())
        return Comparison(self.ids.shape[1], difference, limit, rounding, int(same), len(self._texts()))

    def _texts(self) -> list[str]:
        control = " ".join(self.tokenizer.all_special_tokens)
        texts = [*TEXTS, f"{control} and {control}"]
        if self.tokenizer.chat_template:
            texts.append(_conversation(self.tokenizer))
        return texts

    def _compare_tokenizer(self, read: PreTrainedTokenizerBase) -> None:
        checks: list[tuple[str, object, object]] = [
            (f"the cut of {text!r}", self.tokenizer(text)["input_ids"], read(text)["input_ids"])
            for text in self._texts()
        ]
        checks.append(("the end token", self.tokenizer.eos_token_id, read.eos_token_id))
        if self.tokenizer.chat_template:
            checks.append(("a rendered conversation", _conversation(self.tokenizer), _conversation(read)))
        for what, written, found in checks:
            if written != found:
                raise PromptKDError(
                    f"What was written is not the tokenizer: read back, {what} is {str(found)[:200]} and not "
                    f"{str(written)[:200]}. Nothing is kept. Please report this with the model's tokenizer.json."
                )


def _conversation(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


@torch.no_grad()
def _round(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    """Each weight to the nearest number that its type holds. Raises `RequestError` if one is beyond the largest."""
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(dtypes[name]))
        if not weight.isfinite().all():
            raise RequestError(f"{name} holds numbers that {dtypes[name]} cannot hold. Choose --dtype bf16 or f32.")
