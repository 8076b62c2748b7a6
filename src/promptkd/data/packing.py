"""The old name of `promptkd.data.batch`, for one version."""

import warnings

from promptkd.data.batch import TokenBatch as TokenBatch
from promptkd.data.batch import right_pad as right_pad

warnings.warn("`promptkd.data.packing` is now `promptkd.data.batch`.", FutureWarning, stacklevel=2)
