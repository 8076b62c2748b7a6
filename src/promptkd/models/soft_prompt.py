"""The soft prompt: a few trainable vectors before the embedded request of a frozen teacher (PromptKD section 3.1).

The vectors are in the space of token embeddings after any scaling by the model's embedding layer (Gemma), and take
positions 0 … n - 1. On disk a soft prompt is a PEFT prompt-tuning adapter, which `PeftModel` loads.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig, PromptTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from promptkd.engine import check_soft_prompt, unwrap_peft
from promptkd.errors import RequestError, at
from promptkd.models.adapter_files import note_base
from promptkd.models.merge import base_name, is_adapted

DEFAULT_TEXT = "Suppose you are a student."
PromptStart = Literal["text", "padding", "random"]
_CONFIG_FILE, _WEIGHTS_FILE, _KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


class SoftPrompt(nn.Module):
    """n trainable vectors of the teacher's embedding width, in float32 or wider whatever the teacher's precision."""

    start: Tensor

    def __init__(self, embeddings: Tensor):
        super().__init__()
        if embeddings.ndim != 2:
            raise ValueError(f"A soft prompt must have shape (length, width). Got {tuple(embeddings.shape)}.")
        dtype = torch.promote_types(torch.float32, embeddings.dtype)
        self.embeddings = nn.Parameter(embeddings.detach().clone().to(dtype))
        self.register_buffer("start", self.embeddings.detach().clone())

    @classmethod
    def create(
        cls,
        teacher: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 7,
        start: PromptStart = "text",
        text: str = DEFAULT_TEXT,
        seed: int = 0,
    ) -> "SoftPrompt":
        """Start from the embeddings of `text` (cut or repeated to `length`), of the padding token, or normal noise."""
        if length < 0:
            raise RequestError(f"The soft prompt's length must be 0 or more. Got {length}.")
        embedding = unwrap_peft(teacher).get_input_embeddings()
        if length == 0:
            return cls(torch.empty(0, embedding.weight.shape[1]))
        check_soft_prompt(teacher)
        ids = start_tokens(tokenizer, length=length, start=start, text=text)
        own = ids or list(range(embedding.weight.shape[0]))
        with torch.no_grad():
            vectors = embedding(torch.tensor(own, device=embedding.weight.device))  # the layer may scale its table
        if ids:
            return cls(vectors)
        mean, deviation = vectors.float().mean(0).cpu(), vectors.float().std(0).cpu()
        generator = torch.Generator().manual_seed(seed)
        return cls(mean + deviation * torch.randn(length, mean.shape[0], generator=generator))

    def forward(self) -> Tensor:
        """The vectors, (n, E)."""
        return self.embeddings

    @property
    def length(self) -> int:
        return self.embeddings.shape[0]

    def norm(self) -> float:
        """Frobenius norm of the vectors."""
        return float(self.embeddings.detach().norm())

    def distance(self) -> float:
        """Frobenius norm of the difference between the vectors and their start."""
        return float((self.embeddings.detach() - self.start).norm())

    def save(self, folder: Path, teacher: nn.Module) -> None:
        """Write `folder` as a PEFT prompt-tuning adapter of `teacher`."""
        inner = unwrap_peft(teacher)
        config = inner.config.get_text_config()
        length, width = self.embeddings.shape
        sizes = {"num_virtual_tokens": length, "token_dim": width, "num_transformer_submodules": 1}
        sizes |= {"num_layers": config.num_hidden_layers, "num_attention_heads": _heads(config)}
        task = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name(teacher) or "", "inference_mode": True}
        adapter = PromptTuningConfig(**task, **sizes)
        adapter.save_pretrained(str(folder))
        save_file({_KEY: self.embeddings.detach().cpu().contiguous()}, folder / _WEIGHTS_FILE, {"format": "pt"})
        if is_adapted(teacher):
            note_base(folder, teacher)

    @classmethod
    def load(cls, folder: Path) -> "SoftPrompt":
        """Read a PEFT prompt-tuning adapter. `RequestError` if `folder` holds none."""
        if not (folder / _CONFIG_FILE).is_file() or not (folder / _WEIGHTS_FILE).is_file():
            raise RequestError(f"Expected a PEFT adapter ({_CONFIG_FILE}, {_WEIGHTS_FILE}) in {folder}; none is there.")
        with at(f"{folder / _CONFIG_FILE} is no configuration that PEFT reads", (ValueError, TypeError, KeyError)):
            config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, PromptTuningConfig):
            raise RequestError(f"Expected a prompt-tuning adapter in {folder}. Got one of type {config.peft_type}.")
        with at(f"{folder / _WEIGHTS_FILE} is damaged", SafetensorError):
            tensors = load_file(folder / _WEIGHTS_FILE)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shape = (config.num_virtual_tokens, config.token_dim)
        if found != {_KEY: shape}:
            raise RequestError(f"Expected one tensor {_KEY!r} of shape {shape} in {folder}. Got {found}.")
        return cls(tensors[_KEY])


def _heads(config: Any) -> int:
    """Of a model's attention; 1 where it has none, or layers differ, since PEFT reads it for other kinds alone."""
    try:
        return int(config.num_attention_heads)
    except (AttributeError, RuntimeError):
        return 1


def start_tokens(
    tokenizer: PreTrainedTokenizerBase, *, length: int, start: PromptStart = "text", text: str = DEFAULT_TEXT
) -> list[int]:
    """The `length` tokens whose embeddings a prompt starts from; [] for a random start. `RequestError` for none."""
    if start == "random":
        return []
    if start == "text":
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        problem = f"The soft prompt's initial text must have at least one token. Got {text!r}."
    elif start == "padding":
        ids = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
        problem = "A soft prompt can start from padding only if the tokenizer has a padding token; it has none."
    else:
        raise RequestError(f"A soft prompt starts from {', '.join(get_args(PromptStart))}. Got {start!r}.")
    if not ids:
        raise RequestError(problem)
    return [ids[at % len(ids)] for at in range(length)]
