"""The engine's trials of a model, shared by the suite: what passed once is not tried again for an equal model.

Hundreds of tests make the same tiny models, and each would be tried as if it were a user's.
A trial is a function of the model and of where it runs, so that an equal one would pass as well. Trials that fail are
never shared. The tests of what runs models (tests/engine, tests/models) are for the trials as well: they share none.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd import engine
from promptkd.engine import checks, resolve
from promptkd.engine.backbone import model_matmul_dtype

_passed: set[tuple[object, ...]] = set()
_shared = False


def share_trials() -> None:
    """For the whole process. What imports the names below does so after this."""
    engine.check_scoring = checks.check_scoring = partial(_check_scoring, checks.check_scoring)
    checks._embeddings_problem = partial(_embeddings_problem, checks._embeddings_problem)
    resolve._problem = partial(_problem, resolve._problem)


def shared_in(file: Path) -> None:
    """Trials are shared from here on, or not, as the tests of a file want it."""
    global _shared
    _shared = file.parent.name not in ("engine", "models") or file.name == "test_engines.py"  # of engines in steps


def _check_scoring(check: Callable[[nn.Module], None], model: nn.Module) -> None:
    key = ("scoring", fingerprint(model))
    if key not in _passed:
        check(model)
        _note(key)


def _embeddings_problem(find: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    if model in checks._reads_embeddings:
        return find(model)
    key = ("embeddings", fingerprint(model))
    if key in _passed:
        checks._reads_embeddings[model] = ""
    elif not find(model):
        _note(key)
    return checks._reads_embeddings[model]


def _problem(
    find: Callable[..., str],
    trial: partial[Tensor],
    reference_trial: Callable[[], Tensor],
    model: PreTrainedModel,
) -> str:
    key = ("a way", trial.func, trial.args[0], fingerprint(model), model_matmul_dtype(model))
    if key in _passed:
        return ""
    problem = find(trial, reference_trial, model)
    if not problem:
        _note(key)
    return problem


def _note(key: tuple[object, ...]) -> None:
    if None not in key:
        _passed.add(key)


def fingerprint(model: nn.Module) -> str | None:
    """Class, configuration, modules and every weight; None where no trial is shared, or more than these may count."""
    if not (_shared and isinstance(model, PreTrainedModel)):
        return None
    told = hashlib.blake2b(repr(sorted(vars(model.config).items())).encode())
    told.update(str((torch.overrides._len_torch_function_stack(), torch.is_autocast_enabled("cpu"))).encode())
    for name, module in model.named_modules():
        is_plain = type(module).__module__.startswith(("torch.", "transformers.")) and "forward" not in vars(module)
        if not is_plain or module._forward_hooks or module._forward_pre_hooks:
            return None
        told.update(f"{name} {type(module)}".encode())
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            return None
        told.update(f"{tensor.dtype} {tensor.shape}".encode())
        told.update(_bytes(tensor))
    return told.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
