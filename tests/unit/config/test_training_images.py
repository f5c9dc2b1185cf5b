"""The real images of a run."""

import re
import shlex

import pytest
from shell import run

from ldm.config.training_images import SCENES_TARGET, check_scenes_drawn, find_run_data

DATA = {"_target_": SCENES_TARGET, "folder": "data/scenes", "count": 3, "val_count": 2, "size": 16}


@pytest.mark.parametrize("frames", [None, 2])
def test_missing_scenes_are_refused_with_commands_that_draw_them(tmp_path, monkeypatch, frames):
    monkeypatch.chdir(tmp_path)
    data = DATA | {"frames": frames}
    message = "the scenes of the run are not on this machine"
    with pytest.raises(FileNotFoundError, match=message) as raised:
        check_scenes_drawn(data, *find_run_data(data))
    commands = re.findall("`python (.*?)`", str(raised.value))
    assert len(commands) == 2
    for command in commands:
        run(*shlex.split(command), cwd=tmp_path)
    check_scenes_drawn(data, *find_run_data(data))
