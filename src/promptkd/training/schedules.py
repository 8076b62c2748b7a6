"""Schedules of the adapter's learning rate."""

from functools import cache

import torch
from transformers import SchedulerType, get_scheduler


@cache
def adapter_schedules() -> tuple[str, ...]:
    """transformers' schedules that follow the count of steps alone, and need no settings of their own."""
    return tuple(each.value for each in SchedulerType if _follows_steps(each))


def _follows_steps(kind: SchedulerType) -> bool:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=4)
        optimizer.step()
        scheduler.step()
    except (TypeError, ValueError):  # a setting or a metric is missing
        return False
    return True
