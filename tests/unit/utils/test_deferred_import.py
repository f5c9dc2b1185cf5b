import subprocess
import sys

COMMAND = """
import sys
from ldm.utils.deferred_import import defer_torchmetrics

defer_torchmetrics()
import ldm.config.run, lightning, torchmetrics

heavy = {"scipy", "transformers", "torchmetrics.functional"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
mean, metric = torchmetrics.MeanMetric, torchmetrics.Metric
assert type(torchmetrics) is not type(sys)

from torchmetrics import Accuracy  # a class of the user's: the rest is imported now
from torchmetrics.functional.image import peak_signal_noise_ratio

assert type(torchmetrics) is type(sys)
assert heavy <= set(sys.modules)
assert all(hasattr(torchmetrics, name) for name in torchmetrics.__all__)
assert torchmetrics.MeanMetric is mean and torchmetrics.Metric is metric
assert isinstance(Accuracy(task="binary"), metric)
assert not hasattr(torchmetrics, "no_such_name")
"""


def run_python(command):
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lightning_gets_the_base_classes_and_a_user_gets_everything():
    run_python(COMMAND)


def test_a_torchmetrics_built_in_another_way_is_imported_whole():
    run_python(
        "from ldm.utils import deferred_import\n"
        "deferred_import.FIRST_PARTS['no_such_part'] = ('Metric',)\n"
        "deferred_import.defer_torchmetrics()\n"
        "from torchmetrics.image import PeakSignalNoiseRatio\n"
        "import torchmetrics\n"
        "assert torchmetrics.image.PeakSignalNoiseRatio is PeakSignalNoiseRatio\n"
        "assert torchmetrics.Accuracy(task='binary').update\n"
    )
