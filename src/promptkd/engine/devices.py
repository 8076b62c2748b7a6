"""The device that models run on: a GPU if there is one, else the CPU, and never MPS, the GPU of Apple silicon.

Responses are sampled and metrics summed in float64, which MPS does not have.
"""

import torch

CPU_FOR_MPS = (
    "Everything runs on the CPU: responses are sampled and metrics summed in float64, which MPS, the GPU of Apple "
    "silicon, does not have."
)


def has_mps() -> bool:
    """Whether this machine has the GPU of Apple silicon, which is left unused."""
    return torch.backends.mps.is_available()


def fastest_device() -> torch.device:
    """Where a command runs models that it does not train: CUDA or ROCm, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_device() -> torch.device:
    """Where transformers' arguments train if MPS is left out: any other accelerator, else the CPU."""
    found = None if has_mps() else torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found
