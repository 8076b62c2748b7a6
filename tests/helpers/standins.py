"""Stand-ins that reach no further than the test that makes them: for a library as one module of ours sees it, and for
what torch's functions do while a test runs. The libraries themselves stay as they are."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class StandIn:
    """A module with other names in it: `monkeypatch.setattr("promptkd.precision.torch", StandIn(torch, cuda=...))`."""

    def __init__(self, module: Any, **names: Any):
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class OnResults(TorchFunctionMode):
    """Within it, every call of `function` by this thread's code is told: `tell(result, *args, **kwargs)`."""

    def __init__(self, function: Callable[..., Any], tell: Callable[..., None]):
        super().__init__()
        self.function, self.tell = function, tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.function:
            self.tell(result, *args, **(kwargs or {}))
        return result


class Float64Stays(TorchFunctionMode):
    """transformers casts to float32 inside its norms and its eager softmax; within it, float64 stays float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if func is torch.nn.functional.softmax:
                kwargs["dtype"] = None
        return func(*args, **kwargs)
