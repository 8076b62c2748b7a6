"""Fixtures that several files share."""

import os

from promptkd.cli.openmp import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported, here and in the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request):
    """Where a numerical test runs: on the CPU everywhere, and on a CUDA device where there is one."""
    return torch.device(request.param)


@pytest.fixture
def own_engine(monkeypatch):
    """The device's own engine, also where the suite runs with another one: for tests of how it works."""
    monkeypatch.delenv("PROMPTKD_ENGINE", raising=False)


@pytest.fixture
def float64_inside(monkeypatch):
    """transformers casts to float32 inside its norms and its eager softmax; here float64 stays float64."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def keep_to(self, *args, **kwargs):
        narrows = self.dtype == torch.float64 and args == (torch.float32,)
        return self if narrows else to(self, *args, **kwargs)

    def wide_softmax(values, *args, dtype=None, **kwargs):
        return softmax(values, *args, dtype=None if values.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
