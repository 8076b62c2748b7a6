"""What the suite runs in, and fixtures that several files share."""

import gc
import os
import threading

from promptkd.cli import let_threads_sleep

# Before torch and transformers are imported, here and in the processes that tests start. Tiny models gain nothing from
# a second thread, wait long for it where cores are busy, and it would not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
let_threads_sleep(os.environ)
gc.disable()  # while all is imported, none of which goes

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from helpers import RANKS  # noqa: E402
from helpers.standins import Float64Stays  # noqa: E402
from helpers.trials import share_trials, shared_in  # noqa: E402

# a precision that a test does not name is float32 on every CPU, also on one that multiplies bfloat16
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
share_trials()
os.fsync = lambda handle: None  # what a test writes need not outlive a power failure


def pytest_collection_finish():
    """What is imported by now stays. Every training ends with a collection of garbage, which need not look at it."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(200_000, 10, 10)  # by itself, garbage is looked for seldom
    tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    shared_in(item.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file has imported stays as well."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


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
def float64_inside():
    """transformers casts to float32 inside its norms and its eager softmax; here float64 stays float64."""
    with Float64Stays():
        yield


@pytest.fixture(autouse=True)
def nothing_global_is_left_changed():
    """What one test sets for the whole process, another one must not find."""
    before = settings_of_the_process()
    yield
    assert settings_of_the_process() == before


def settings_of_the_process():
    return {
        "folder": os.getcwd(),
        "engine": os.environ.get("PROMPTKD_ENGINE"),
        "ranks": {name: os.environ.get(name) for name in RANKS},
        "process group": torch.distributed.is_initialized(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "cast": torch.Tensor.to,
        "linear": torch.nn.functional.linear,
        "GPU": torch.cuda.is_available,
    }
