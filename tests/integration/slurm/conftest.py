"""A SLURM cluster on this machine, for the tests of this folder."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The environment in which srun and sbatch reach a cluster of two nodes with two CPUs each.

    It leaves out the variables of an allocation that the tests themselves may run in.
    """
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash to start SLURM with")
    folder = tmp_path_factory.mktemp("slurm")
    start = [bash, str(SCRIPT), "start", str(folder)]
    done = subprocess.run(start, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        # Not to be had, or its daemons do not run here: the machine's affair, not the launcher's.
        pytest.skip((done.stderr.splitlines() or ["cluster.sh failed"])[-1])
    conf = done.stdout.splitlines()[-1].removeprefix("export SLURM_CONF=")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    yield {**kept, "SLURM_CONF": conf}
    subprocess.run([bash, str(SCRIPT), "stop", str(folder)], check=True, timeout=60)
