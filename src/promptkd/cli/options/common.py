"""Options that several commands have."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from promptkd.settings import option

MOST_TOKENS = 1_000_000  # of a response: buffers have room for as many
LESS_MEMORY_TO_DECODE = (
    "a smaller --batch-size (now {batch_size})",
    "a smaller --max-completion-length (now {max_completion_length})",
)


@dataclass(kw_only=True)
class Loading:
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in; auto is bfloat16 where the device has units for it."""
    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Precision of the model's weights; by default float32, on a GPU that computes in bfloat16 that of weights saved in
    bfloat16. auto is that of its files."""
    model_init_kwargs: dict[str, Any] | None = None
    """Arguments of from_pretrained, such as {"device_map": "auto"} to spread the model over the GPUs."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""


@dataclass(kw_only=True)
class Sampling:
    temperature: float = option(1.0, at_least=0)
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = option(1.0, above=0, at_most=1)
    """Share of the probability mass to sample from."""
    top_k: int = option(0, at_least=0)
    """Number of tokens to sample from; 0 for all."""


@dataclass(kw_only=True)
class Rows:
    template: str = "auto"
    """auto (what the model was trained on, else its chat template, else alpaca), alpaca, chat, or a Jinja text."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}; a row's own column wins."""
    columns: dict[str, str] | list[str] | None = None
    """Columns to read under other names, as OLD=NEW, such as problem=instruction solution=output."""


@dataclass(kw_only=True)
class Measuring(Loading, Rows):
    batch_size: int | None = option(None, at_least=1)
    """Rows to decode at a time; by default 32 on CPU, 128 on a GPU."""
    limit: int | None = None
    """Use the first so many rows of each data set."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are dropped and counted."""
    max_completion_length: int = option(256, at_least=1, at_most=MOST_TOKENS)
    """Most tokens of a response."""
    overwrite: bool = False
    """Replace --out."""


@dataclass(kw_only=True)
class TeacherPrecision:
    teacher_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """Arguments of from_pretrained for the teacher, such as {"device_map": "auto"} to spread it over the GPUs."""


@dataclass(kw_only=True)
class TeacherContext(TeacherPrecision):
    teacher_prompt: str | None = None
    """A text, or a file that holds one, that the teacher alone reads before each request, as in distill: Jinja of the
    row's fields; a row's column teacher_prompt takes its place. '' has the column read alone. By default the teacher
    reads what the student reads. See docs/context-teachers.md."""
    max_teacher_prompt_length: int | None = option(None, at_least=1)
    """Most tokens of a teacher's prompt with its context, 1024 by default; rows above it are dropped and counted."""


@dataclass(kw_only=True)
class Training:
    data: str
    """Training rows: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """Folder of the run."""
    eval_data: str | None = None
    """Validation rows, in the same forms."""
    limit: int | None = None
    """Use the first so many training rows."""
    eval_limit: int | None = None
    """Use the first so many validation rows."""
    keep: int | None = option(2, at_least=1)
    """Checkpoints to keep, the newest and the best always among them; none keeps all."""
    resume: bool = False
    """Resume the run in OUT from its last checkpoint; its settings are taken from there."""
    overwrite: bool = False
    """Replace the run in OUT."""
