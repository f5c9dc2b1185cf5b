import subprocess
import sys

import pytest

# Two megabytes at a time are freed and allocated again, as a training step does.
COUNT_FAULTS = """
import resource
from ldm.utils.allocator import reuse_freed_memory
import numpy as np

reuse_freed_memory()
step = lambda: [np.ones(2**18) for _ in range(8)]
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of most Linux systems")
def test_freed_memory_is_reused_without_page_faults():
    said = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, check=True)
    assert int(said.stdout) < 100, "each step has 4096 pages"
