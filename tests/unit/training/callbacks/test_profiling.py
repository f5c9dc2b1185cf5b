"""profile=true: a trace and a page, and a training that goes on as without it."""

import gzip
import json

import pytest
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.profiling import StepProfiler
from ldm.utils.hashing import hash_module

pytestmark = pytest.mark.filterwarnings("ignore:.*srun", "ignore:The number of training batches")


def test_a_profile_is_written_and_changes_nothing(tiny_text, shapes, tmp_path, capsys):
    plain, profiled = (latent_diffusion(tiny_text) for _ in range(2))
    how = {"steps": 9}
    make_trainer(**how).fit(plain, datamodule=shapes_data(shapes))
    profiler = StepProfiler(tmp_path / "profile")
    make_trainer(**how, callbacks=[profiler]).fit(profiled, datamodule=shapes_data(shapes))
    assert profiler.profiler is None
    assert hash_module(plain) == hash_module(profiled)
    page, trace = tmp_path / "profile/costs.md", tmp_path / "profile/trace.json.gz"
    assert f"the ten largest costs are in {page}, the trace in {trace}" in capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if "%" in line]
    assert len(rows) == 10
    assert any("conv" in row[0] for row in rows)
    times = [float(row[1]) for row in rows]
    assert times == sorted(times, reverse=True)
    with gzip.open(trace) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 3


def test_a_training_too_short_for_a_profile_says_so(tiny_text, shapes, tmp_path, capsys):
    trainer = make_trainer(steps=2, callbacks=[StepProfiler(tmp_path / "profile")])
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    assert "profile: there is none, as it takes 9 training steps" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_disk_without_room_gives_a_line(tiny_text, shapes, tmp_path, capsys):
    (tmp_path / "profile").write_text("a file, where the folder would be")
    trainer = make_trainer(steps=10, callbacks=[StepProfiler(tmp_path / "profile")])
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    assert trainer.global_step == 10
    assert f"profile: {tmp_path}/profile cannot be written" in capsys.readouterr().out
