"""Dropout, wherever a model keeps its rates."""

from collections.abc import Iterator

from torch import nn

__all__ = ["applies_dropout", "disable_dropout"]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, also the ones that layers hand to functions (OPT's, any attention's)."""
    for module, name in _rates(model):
        setattr(module, name, 0.0)


def applies_dropout(model: nn.Module) -> bool:
    """Whether a forward of `model`, in the mode that it is in, drops anything."""
    return model.training and any(vars(module)[name] > 0 for module, name in _rates(model))


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module with a rate, and the name that it has there."""
    for module in model.modules():
        for name, value in vars(module).items():
            named = "dropout" in name or name == "layerdrop" or (name == "p" and isinstance(module, nn.Dropout))
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                yield module, name
