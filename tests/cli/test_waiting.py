"""OpenMP's threads sleep while they wait, unless someone has said otherwise."""

import os
import subprocess
import sys

import pytest

from promptkd.cli import let_threads_sleep

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def test_threads_sleep_where_nothing_is_said():
    environment = {"OMP_NUM_THREADS": "2"}
    let_threads_sleep(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize("name", NAMES)
def test_what_someone_says_stays(name):
    environment = {name: "7"}
    let_threads_sleep(environment)
    assert environment == {name: "7"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there, which prints other lines")
def test_the_command_line_says_it_before_torch_is_imported():
    """What OpenMP says of itself when torch loads it: how often a waiting thread looks before it sleeps."""
    program = "from promptkd.cli import main; main(['--version']); import torch"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"OMP_DISPLAY_ENV": "verbose"}
    heard = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '1000'" in heard.stderr
