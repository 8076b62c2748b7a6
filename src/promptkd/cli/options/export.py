"""Write a model as serving tools load it: one GGUF file for llama.cpp, or a safetensors folder for vLLM.

A LoRA student is merged into its base. What was written is read back and compared with the model before it takes its
place. A Modelfile for Ollama is written beside a GGUF file. GGUF knows Llama (SmolLM2), Qwen2, Qwen3 and GPT-2 with
byte-level BPE tokenizers.

    promptkd export runs/promptkd --to gguf --out student.gguf --dtype f16
    promptkd export runs/promptkd --to safetensors --out student --dtype bf16
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

POSITIONAL = "model"


@dataclass
class Options:
    model: str
    """What to write: a run folder, model folder, hub name or GGUF file."""
    to: Literal["gguf", "safetensors"]
    """The form: a file for llama.cpp, or a folder for transformers and vLLM."""
    out: Path
    """The .gguf file or the folder to write."""
    dtype: Literal["f32", "f16", "bf16"] = "f16"
    """How the weights are stored."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Replace --out."""
