"""The tokens that end a response, kept where transformers, vLLM and llama.cpp look for them."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.encode import stop_token_ids
from promptkd.engine import unwrap_peft
from promptkd.errors import RequestError

GENERATION_CONFIG = "generation_config.json"


def keep_end_tokens(model: nn.Module, ids: Iterable[int]) -> None:
    """Let the model's generation configuration, which is saved with it, name all `ids` that end a response."""
    inner = unwrap_peft(model)
    if inner.generation_config is None:
        inner.generation_config = GenerationConfig()
    held = inner.generation_config.eos_token_id
    before = [] if held is None else list(held) if isinstance(held, list | tuple) else [held]
    if missing := sorted(set(ids) - set(before)):
        together = [*before, *missing]  # some tools read the first alone, which stays the first
        inner.generation_config.eos_token_id = together if len(together) > 1 else together[0]
        inner.generation_config._from_model_config = False  # or transformers may read config.json in its place


def known_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response of a model whose template is not known: its own, its tokenizer's, its chat's."""
    try:
        return stop_token_ids(tokenizer, model.generation_config, "auto")
    except RequestError:  # a chat template that renders no plain conversation tells no end
        return stop_token_ids(tokenizer, model.generation_config)


def save_generation_config(model: nn.Module, folder: Path) -> None:
    """Write the base's generation configuration beside an adapter, where PEFT writes none."""
    config = unwrap_peft(model).generation_config
    if config is not None:
        config.save_pretrained(folder)


def load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the generation configuration beside its adapter in `folder`, if there is one."""
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
