"""A component of the user's own: trained by its name, sampled only where its package is trusted."""

from pathlib import Path

import pytest
from PIL import Image
from shell import ROOT, TRAIN, run

pytestmark = pytest.mark.slow  # each test is processes
SAMPLE = str(ROOT / "sample.py")
DATA = ["data.count=8", "data.val_count=4", "data.size=16", "data.batch_size=4", "data.workers=0"]
FEW = ["trainer=cpu", "trainer.max_steps=1", "eval=none", "logger=csv", "samples.n=0", *DATA]
OWN = ["scheduler=flow", "scheduler._target_=own_noise.schedules.PowerSchedule"]
OWN += ["scheduler.shift=-3"]  # which ours would refuse, and this one takes
REFUSAL = (
    "it asks to call 'own_noise.schedules.PowerSchedule', which is no scheduler of ours: "
    "add trust=[own_noise] if you trust that package"
)
HERE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run(TRAIN, *FEW, *OWN, "name=own", cwd=home, **HERE)
    return home


def test_a_run_with_an_own_schedule_is_sampled_only_where_it_is_trusted(home):
    one = [SAMPLE, "ckpt=runs/own", "prompt=a red circle", "steps=2", "out=a.png"]
    assert REFUSAL in run(*one, cwd=home, expect=2, **HERE)
    assert not (home / "a.png").exists()
    run(*one, "n=1", "trust=[own_noise]", cwd=home, **HERE)
    assert Image.open(home / "a_000.png").size == (16, 16)


def test_a_run_goes_on_from_one_with_an_own_schedule_only_where_it_is_trusted(home):
    more = [TRAIN, *FEW, *OWN, "init=runs/own", "name=more"]
    assert REFUSAL in run(*more, cwd=home, expect=2, **HERE)
    assert "init: the weights of" in run(*more, "trust=own_noise", cwd=home, **HERE)
