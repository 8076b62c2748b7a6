"""Ask one or several models, and see their answers side by side as they are written.

With a chat template each model reads the whole conversation with its own answers; without one (--template alpaca, or a
tokenizer that has none) every request stands alone. Without a terminal each line of standard input is a request, and
the answers are plain text, one labeled block per model. A model's control characters are shown and never obeyed.

    promptkd chat runs/promptkd runs/kd --teacher runs/teacher
    promptkd chat runs/promptkd --prompt "Name three rivers." --temperature 0.7 --seed 1
"""

from dataclasses import dataclass
from typing import Any

from promptkd.cli.options.common import MOST_TOKENS, Loading, Sampling
from promptkd.settings import option

POSITIONAL = "models"
LESS_MEMORY = ("fewer models", "a smaller --max-completion-length (now {max_completion_length})")


@dataclass(kw_only=True)
class Options(Sampling, Loading):
    models: list[str]
    """Who answers: hub names, folders, run folders or GGUF files."""
    teacher: str | None = None
    """One more model, shown last and labeled as the teacher."""
    prompt: str | None = None
    """Ask this once and leave."""
    temperature: float = option(0.0, at_least=0)
    """Sampling temperature; 0 decodes greedily."""
    seed: int = option(10, at_least=0)
    """Seed of the samples."""
    template: str = "auto"
    """auto (what the model was trained on, else its chat template, else alpaca), alpaca, chat, or a Jinja text."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}."""
    max_completion_length: int = option(256, at_least=1, at_most=MOST_TOKENS)
    """Most tokens of an answer."""
