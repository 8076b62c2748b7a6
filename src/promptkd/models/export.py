"""Exports a model for serving tools, and verifies the export by reading it back.

Logits are compared with those of the model whose weights are rounded to the chosen type. They agree up to the order of
additions, so that small errors show. The effect of the rounding itself is measured beside it.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.errors import PromptKDError, RequestError
from promptkd.models.end_tokens import keep_end_tokens, known_end_tokens
from promptkd.models.folder import clear_load_errors, save_tokenizer
from promptkd.models.gguf_format import convert_gguf, gguf_problems, stored_type, write_gguf
from promptkd.models.load import generation_config_of, load_model, load_tokenizer
from promptkd.models.vocabulary import PROBES

_TOLERANCE = 1e-4  # most that logits may differ, as a share of the largest
_SAMPLE = 128  # most tokens that logits are compared on
ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Comparison:
    """The model that was read back against the one that was written."""

    tokens: int  # how many tokens the logits were compared on
    difference: float  # largest difference of a logit from the model's with rounded weights
    limit: float  # largest difference that passes
    rounding: float  # largest difference of a logit that the rounding of the weights makes
    same_choices: int  # after how many of the `tokens` the rounded model finds the same token the most probable
    texts: int  # how many texts were split into the same tokens


def plain_model(name: str, *, trust_remote_code: bool = False) -> ModelAndTokenizer:
    """A float32 model, LoRA merged and all end tokens named, with its tokenizer."""
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = load_model(name, trust_remote_code=trust_remote_code)
    keep_end_tokens(model, known_end_tokens(model, tokenizer))
    return model, tokenizer


def export_safetensors(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Comparison:
    """Write a folder that transformers and vLLM load. `model` is left in `dtype`. Errors as for `export_gguf`."""

    def write() -> None:
        model.config.use_cache = True  # training may have switched it off
        model.to(dtype).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)

    dtypes = {name: dtype for name, _ in model.named_parameters()}
    return _verified(model, tokenizer, dtypes, write, lambda: _load(folder, trust_remote_code))


def export_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, *, title: str
) -> Comparison:
    """Write a GGUF file that llama.cpp loads. The weights of `model` are left rounded to `dtype`.

    `RequestError` for a model that `write_gguf` does not know, or weights that `dtype` cannot hold; `PromptKDError` if
    what was read back is not what was written.
    """
    if problems := gguf_problems(model, tokenizer):
        command = "`python convert_hf_to_gguf.py FOLDER --outfile FILE.gguf` from a checkout of llama.cpp"
        advice = f"llama.cpp's own converter knows more models: export to safetensors, then run {command}."
        raise RequestError(f"This model cannot be written as GGUF here: {'; '.join(problems)}. {advice}")

    dtypes = {name: stored_type(name, weight, dtype) for name, weight in model.named_parameters()}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:

        def read() -> ModelAndTokenizer:  # weights may stay on the disk: the folder is kept until they are compared
            convert_gguf(file, Path(folder))
            return _load(Path(folder))

        return _verified(model, tokenizer, dtypes, lambda: write_gguf(file, model, tokenizer, dtype, title), read)


def can_write_gguf(folder: Path) -> bool:
    """Whether `export_gguf` knows the model in a folder, by its files without its weights."""
    with clear_load_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.generation_config = generation_config_of(folder)
    return not gguf_problems(model, load_tokenizer(folder))


def _load(folder: Path, trust_remote_code: bool = False) -> ModelAndTokenizer:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return load_model(folder, trust_remote_code=trust_remote_code), tokenizer


@torch.no_grad()
def _verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtypes: dict[str, torch.dtype],
    write: Callable[[], None],
    read: Callable[[], ModelAndTokenizer],
) -> Comparison:
    """Round each weight of the model to its type in `dtypes`, write the model, and compare it with what is read."""
    tokens = [index for text in PROBES for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([tokens[:_SAMPLE]], device=model.device)
    exact = _logits(model, ids)
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(dtypes[name]))
        if not weight.isfinite().all():
            raise RequestError(f"{name} holds numbers that {dtypes[name]} cannot hold. Choose --dtype bf16 or f32.")
    rounded = _logits(model, ids)
    write()
    try:
        found, found_tokenizer = read()
    except RequestError as error:  # it was promptkd that wrote it
        raise PromptKDError(f"What was written cannot be read back, and nothing is kept: {error}") from error
    texts = _compare_tokenizers(tokenizer, found_tokenizer)
    limit = _TOLERANCE * max(1.0, float(rounded.abs().max()))
    difference = float((_logits(found, ids) - rounded).abs().max())
    if not difference <= limit:  # NaN, too
        problem = f"its logits differ by up to {difference:.2g}, and {limit:.2g} was expected at most"
        advice = "Nothing is kept. Please report this with the model's config.json."
        raise PromptKDError(f"What was written is not the model: read back, {problem}. {advice}")
    same = int((exact.argmax(-1) == rounded.argmax(-1)).sum())
    return Comparison(ids.shape[1], difference, limit, float((exact - rounded).abs().max()), same, texts)


def _compare_tokenizers(written: PreTrainedTokenizerBase, read: PreTrainedTokenizerBase) -> int:
    """The number of texts that were compared."""
    control = " ".join(written.all_special_tokens)
    texts = [*PROBES, f"{control} and {control}"]
    checks: list[tuple[str, object, object]] = []
    if written.eos_token_id is not None:  # else GGUF's is the chat template's or the model's
        checks.append(("the end token", written.eos_token_id, read.eos_token_id))
    if written.chat_template:
        messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
        here, there = (each.apply_chat_template(messages, tokenize=False) for each in (written, read))
        texts.append(here)
        checks.append(("a rendered conversation", here, there))
    tokens = [(f"the tokens of {text!r}", written(text)["input_ids"], read(text)["input_ids"]) for text in texts]
    for what, expected, found in (*tokens, *checks):
        if expected != found:
            problem = f"{what} is {str(found)[:200]} and not {str(expected)[:200]}"
            advice = "Nothing is kept. Please report this with the model's tokenizer.json."
            raise PromptKDError(f"What was written is not the tokenizer: read back, {problem}. {advice}")
    return len(texts)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
