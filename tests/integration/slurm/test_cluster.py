"""The cluster that the tests of the SLURM launcher stand on."""

import subprocess

import pytest


@pytest.mark.slow
def test_srun_reaches_two_nodes(cluster):
    command = ["srun", "-N2", "-n2", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME"]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 127.0.0.1", "1 127.0.0.2"]
