"""Upload a finished run's student, or its soft prompt, to the Hugging Face hub.

Uploaded are weights as safetensors, their configuration, the tokenizer, and a model card made from the run's record;
nothing else of the run, no pickle, and no folder of this machine. --dry-run prints every file and the card, and uploads
nothing. The token is that of HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub.

    promptkd publish runs/promptkd me/small --license apache-2.0 --dry-run
    promptkd publish runs/promptkd me/small --license apache-2.0 --results test.json --private
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

POSITIONAL = ("run", "repository")


@dataclass
class Options:
    run: Path
    """The folder of a run of distill or sft, or of a model that prune made."""
    repository: str
    """The repository, as OWNER/NAME; it is made if there is none."""
    license: str
    """The license, by the hub's identifier: apache-2.0, mit, cc-by-nc-4.0, llama3.2, other. The models that the student
    was made from have licenses of their own, which may decide it."""
    prompt: bool = False
    """Upload the soft prompt in place of the student."""
    merge: bool = False
    """Upload a LoRA student merged into its base; else it is uploaded as an adapter."""
    dtype: Literal["f32", "f16", "bf16"] | None = None
    """Store the weights of a whole or merged student so; by default as they are."""
    base: str | None = None
    """The hub's name of the model that an adapter or soft prompt belongs to, where the run had it in a local folder."""
    results: list[Path] = field(default_factory=list)
    """Further records of the student for the card: of evaluate or compare."""
    private: bool = False
    """Make a private repository."""
    dry_run: bool = False
    """Print what would be uploaded, and upload nothing."""
    overwrite: bool = False
    """Replace what the repository holds."""
