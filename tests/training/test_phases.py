"""Phases of an optimizer step: seconds of work done, peaks of memory, and how often the device is waited for."""

import time

import numpy as np
import pytest
import torch

import promptkd.memory
from helpers.standins import StandIn
from helpers.trainers import trainer
from promptkd.memory import gibibytes, is_out_of_memory, peak_memory, resident_memory, restart_peak
from promptkd.training import phases as module
from promptkd.training.phases import Phases

CPU = torch.device("cpu")
MIB = 2**20


class Device:
    """A device with a queue: work takes its time when the device is waited for, and its memory at once."""

    def __init__(self, monkeypatch):
        self.clock, self.queued, self.held, self.reached, self.waits = 0.0, 0.0, 0, 0, 0
        cuda = StandIn(
            torch.cuda,
            synchronize=self.synchronize,
            max_memory_allocated=lambda device: self.reached,
            reset_peak_memory_stats=self.reset,
        )
        monkeypatch.setattr(module, "time", StandIn(time, perf_counter=lambda: self.clock))
        monkeypatch.setattr(module, "torch", StandIn(torch, cuda=cuda))

    def work(self, seconds, memory=0):
        self.queued += seconds
        self.reached = max(self.reached, self.held + memory)

    def synchronize(self, device):
        self.waits += 1
        self.clock, self.queued = self.clock + self.queued, 0.0

    def reset(self, device):
        self.reached = self.held


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_seconds_are_of_work_that_is_done_and_inner_phases_count_for_themselves(device):
    phases = Phases(torch.device("cuda"))
    with phases("student"):
        device.work(1)
        with phases("rollout"):
            device.work(10)
        device.work(2)
        with phases("prompt"):
            device.work(20)
        device.work(4)
    assert phases.seconds == {"student": 7, "rollout": 10, "prompt": 20}
    assert phases.lap() == {"student": 7, "rollout": 10, "prompt": 20}
    with phases("update"):
        device.work(3)
    assert phases.lap() == {"student": 0, "rollout": 0, "prompt": 0, "update": 3}


def test_micro_batches_before_the_last_do_not_wait(device):
    phases = Phases(torch.device("cuda"))
    for last in (False, False, True):
        with phases("student", synchronize=last):
            device.work(5)
        assert device.waits == int(last)
    assert phases.seconds == {"student": 15}


def test_every_phase_has_its_own_peak_and_resets_do_not_lose_the_overall_one(device):
    device.work(0, memory=900)  # loading
    phases = Phases(torch.device("cuda"))
    with phases("student"):
        device.work(1, memory=100)
        with phases("rollout"):
            device.work(1, memory=300)
        device.held = 50
        device.work(1, memory=200)
    device.work(1, memory=400)  # clipping, in no phase
    with phases("update"):
        device.work(1, memory=10)
    assert phases.peaks == {"student": 250, "rollout": 300, "update": 60}
    assert phases.peak == 900
    device.work(0, memory=950)
    assert phases.peak == 1000
    assert not phases.sampled


def test_an_error_leaves_the_innermost_phase_to_be_named():
    phases = Phases(CPU)
    with pytest.raises(ValueError, match="here"), phases("student"):  # noqa: PT012
        phases.works_on([3, 4])
        with phases("prompt"):
            phases.works_on([5])
            raise ValueError("here")
    assert (phases.failing.name, phases.failing.lengths) == ("prompt", (5,))
    phases.begin("update")  # a phase that no block holds
    phases.restart()
    assert phases.failing is None
    phases.begin("update")
    assert phases.failing.name == "update"


def allocate(mebibytes):
    """Memory that is really there, and gone again."""
    np.full(mebibytes * MIB, 1, dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.skipif(restart_peak() is None, reason="the system does not let a process restart its peak")
def test_peaks_of_the_process_by_phase():
    phases = Phases(CPU)
    before = resident_memory()
    with phases("rollout"):
        allocate(300)
    with phases("student"):
        allocate(100)
    assert phases.peaks["rollout"] - before == pytest.approx(300 * MIB, abs=60 * MIB)
    assert phases.peaks["rollout"] - phases.peaks["student"] == pytest.approx(200 * MIB, abs=60 * MIB)
    assert phases.peak >= phases.peaks["rollout"]
    assert peak_memory() == phases.peak


def test_where_the_peak_cannot_be_restarted_phases_say_what_they_end_with(monkeypatch, tmp_path):
    monkeypatch.setattr(promptkd.memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    phases = Phases(CPU)
    with phases("rollout"):
        allocate(300)
    assert phases.sampled
    assert phases.peaks["rollout"] < resident_memory() + 100 * MIB
    assert phases.peak > phases.peaks["rollout"]  # the process's one peak has seen it


@pytest.mark.slow
def test_a_trainers_step_waits_a_handful_of_times_and_never_within_a_pass(tmp_path, device, monkeypatch):
    made = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=3)
    made.phases = made.tuner._phases = Phases(torch.device("cuda"))
    waits = []
    made.add_callback(step_ends(waits, device))
    original = made.student_loss._loss

    def watched(*args, **kwargs):
        before = device.waits
        loss = original(*args, **kwargs)
        assert device.waits == before
        return loss

    monkeypatch.setattr(made.student_loss, "_loss", watched)
    made.train()
    assert waits == [3, 6, 9]  # after rollout, prompt and the last micro-batch
    assert set(made.phases.seconds) == {"rollout", "prompt", "student"}


def step_ends(waits, device):
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            waits.append(device.waits)

    return Ends()


@pytest.mark.slow
def test_a_run_knows_its_phases(tmp_path):
    made = trainer(tmp_path, max_steps=2)
    made.train()
    assert set(made.phases.seconds) == set(made.phases.peaks) == {"rollout", "prompt", "student", "update"}
    logged = made.state.log_history
    for name in ("rollout", "prompt", "student"):
        summed = sum(entry[f"seconds_{name}"] for entry in logged if f"seconds_{name}" in entry)
        assert summed == pytest.approx(made.phases.seconds[name])
    assert made.phases.failing is None


# ---- what an allocator says ----


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error, told):
    assert is_out_of_memory(error) == told


def test_what_torch_raises_on_this_machine_is_one_of_them():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert f"{gibibytes(4 * 10**15)} more were asked for" in promptkd.memory.memory_status(caught.value)


def test_of_a_gpu_it_is_said_what_torch_has_allocated_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 76 * 2**30)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of ..."
    )
    assert promptkd.memory.memory_status(error) == (
        "76.00 GiB of the GPU's 80.00 GiB were allocated, and 0.50 GiB more were asked for."
    )
