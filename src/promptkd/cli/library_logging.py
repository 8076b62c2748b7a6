"""What transformers, datasets and accelerate say on the terminal beside the command's own lines."""

import logging
import warnings

from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Leave the terminal to the command's own lines; errors of the libraries still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("accelerate", "promptkd.training.student"):  # the latter's notes, a command says itself
        logging.getLogger(name).setLevel(logging.ERROR)
