"""The settings by which responses are sampled: who reads them."""

import logging
from typing import Any

from promptkd.errors import RequestError
from promptkd.methods import Method
from promptkd.responses import writes_responses

_LOGGER = logging.getLogger(__name__)
_UNTOUCHED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


def needs_generate(args: Any) -> bool:
    """Whether sampling is asked for as only transformers' `generate` (or vLLM) does it."""
    return args.min_p is not None or args.repetition_penalty != 1.0 or bool(args.generation_kwargs)


def check_sampling(args: Any, method: Method, name: str, *, resumes: bool = False) -> None:
    """Refuse what the method `name` does not read, or cannot weigh.

    `resumes`: a run that an earlier version began with what nothing reads goes on, and leaves it out.
    """
    changed = [each for each, default in _UNTOUCHED.items() if vars(args)[each] != default]
    changed += ["generation_kwargs"] if args.generation_kwargs else []
    if not writes_responses(method.responses):
        if args.use_vllm:
            problem = f"{name} samples no responses, so vLLM would hold memory for nothing"
            raise RequestError(f"{problem}. Leave --use_vllm out.")
        if changed:
            flags = ", ".join(f"--{each}" for each in changed)
            other = " --distillation_temperature is that of the objective." if "temperature" in changed else ""
            told = f"{name} samples no responses, and reads no {flags}"
            if not resumes:
                raise RequestError(f"{told}. Leave it out.{other}")
            _LOGGER.warning(f"{told}.")
            for each in changed:
                setattr(args, each, _UNTOUCHED.get(each))
    if method.responses.needs_exact_samples and changed:
        raise RequestError(
            f"{name} weighs the responses as samples at temperature 1 of the whole distribution. Leave --temperature, "
            "--top_p, --top_k, --min_p, --repetition_penalty and --generation_kwargs as they are."
        )
