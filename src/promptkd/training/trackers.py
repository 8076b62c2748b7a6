"""Trackers that show a run while it trains: which can be used here, and TensorBoard's logs beside the run."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, is_azureml_available

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}  # others are named as the tracker


def tracker_checks(names: Any) -> list[tuple[bool, str]]:
    """For `check_all`: trackers, the list `report_to`, that are unknown or whose package is not installed."""
    if not names:
        return []
    usable = set(get_available_reporting_integrations())
    usable |= {"azure_ml"} if is_azureml_available() else set()  # which transformers leaves out beside mlflow
    usable |= {"flyte"} if find_spec("flytekit") else set()
    known = sorted(INTEGRATION_TO_CALLBACK)
    unknown = [name for name in names if name not in known]
    checks = [(True, f"report_to must be one of {', '.join(known)}, got {name}") for name in unknown]
    for name in names:
        if name in known and name not in usable:
            package = _PACKAGES.get(name, name)
            checks.append((True, f"report_to {name} needs a package that is not installed: pip install {package}"))
    return checks


class LiveCurves(TensorBoardCallback):
    """TensorBoard's logs in a folder of the run. A resumed run overwrites what came after its checkpoint."""

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the logs at the step from which the run goes on."""
        if state.is_world_process_zero:
            lost = state.global_step + 1 if state.global_step else None
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=lost)
