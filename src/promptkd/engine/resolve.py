"""Which engine runs a model: that of its device, unless `PROMPTKD_ENGINE` names another."""

import os
from functools import cache
from importlib import import_module

import torch

from promptkd.engine.base import Engine
from promptkd.engine.reference import REFERENCE
from promptkd.errors import RequestError

VARIABLE = "PROMPTKD_ENGINE"
ENGINES = ("reference", "cpu", "cuda")


def engine_for(device: torch.device) -> Engine:
    """The engine for models on `device`.

    Raises:
        RequestError: if the environment names an unknown engine, or one for another kind of device.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in ENGINES:
        raise RequestError(f"{VARIABLE} must be one of {', '.join(ENGINES)}. Got {asked!r}.")
    if asked in ("cpu", "cuda") and asked != device.type:
        raise RequestError(
            f"{VARIABLE}={asked} was asked for, and a model is on {device}. Leave it out, or set it to reference."
        )
    return REFERENCE if asked == "reference" else _of_kind(device.type)


@cache
def _of_kind(kind: str) -> Engine:
    """The engine for a kind of device, whose package is imported at its first use."""
    return import_module(f"promptkd.engine.{kind}").ENGINE if kind in ("cpu", "cuda") else REFERENCE
