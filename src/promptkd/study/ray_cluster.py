"""Runs on a Ray cluster: each one a task, on whichever node has the cores and GPUs that it asks for.

Every node must have promptkd installed and see the study's folder, models and data under the same paths.
"""

import os
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError
from promptkd.study.processes import Job, run_commands

_CANCELLED = -15


class RayCluster:
    """Gives all jobs to Ray at once, which begins them as there is room.

    `address` is by default RAY_ADDRESS, or the cluster on this machine; a fraction of `gpus` lets runs share one.
    """

    def __init__(self, address: str | None, *, cpus: int, gpus: float):
        try:
            import ray
        except ImportError as error:
            raise RequestError("--engine ray needs Ray. Install it by: pip install 'promptkd[ray]'.") from error
        self._ray = ray
        place = address or os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=place, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"No Ray cluster answers at {address or 'this machine'}: {reason} Start one by `ray start --head`, or "
                "name one by --ray-address."
            ) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            held = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
            ray.shutdown()
            raise RequestError(
                f"No node of the cluster has --cpus-per-run {cpus} and --gpus-per-run {gpus:g}. Its nodes have {held}."
            )
        self._task = ray.remote(run_commands).options(num_cpus=cpus, num_gpus=gpus)
        self._environment = {"OMP_NUM_THREADS": str(max(1, cpus))}
        self._jobs: dict[Any, Job] = {}
        self._logged: dict[str, int] = {}

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self._logged[job.name] = _size(job.log)
        self._jobs[self._task.remote(job.commands, job.log, self._environment, Path.cwd())] = job

    def has_begun(self, job: Job) -> bool:
        """Whether a job that was started has begun, which its log shows."""
        return _size(job.log) > self._logged[job.name]

    def finished(self) -> dict[str, int]:
        """The jobs that have ended since the last call, with their exit statuses."""
        ready = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)[0] if self._jobs else ()
        ended = {task: self._jobs.pop(task) for task in ready}
        return {job.name: self._status(task, job) for task, job in ended.items()}

    def stop(self, *, at_once: bool = False) -> None:
        """Ask every run to stop, for which it writes a checkpoint first, or end it at once."""
        for task in self._jobs:
            self._ray.cancel(task, force=at_once)

    def close(self) -> None:
        """Leave nothing running, and the cluster alone."""
        self.stop(at_once=True)
        self._ray.shutdown()

    def _status(self, task: Any, job: Job) -> int:
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(task))
        except errors.TaskCancelledError:
            return _CANCELLED
        except errors.RayError as error:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("a", encoding="utf-8") as file:
                file.write(f"Ray could not finish this run: {error}\n")
            return 1


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
