"""profile=true: a trace and a page, and a training that goes on as without it."""

import gzip
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.profiling import StepProfiler, format_largest_costs
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
    profiler = StepProfiler(tmp_path / "profile")
    trainer = make_trainer(steps=2, callbacks=[profiler])
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    assert profiler.profiler is None, "none runs on"
    assert "profile: there is none, as it takes 9 training steps" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_disk_without_room_gives_a_line(tiny_text, shapes, tmp_path, capsys):
    (tmp_path / "profile").write_text("a file, where the folder would be")
    trainer = make_trainer(steps=10, callbacks=[StepProfiler(tmp_path / "profile")])
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    assert trainer.global_step == 10
    assert f"profile: {tmp_path}/profile cannot be written" in capsys.readouterr().out


def test_a_kernel_and_what_started_it_are_one_cost():
    def cost(name: str, device: DeviceType, milliseconds: float) -> SimpleNamespace:
        times = {"self_device_time_total": 3000 * milliseconds, "self_cpu_time_total": 9.0}
        return SimpleNamespace(
            key=name, device_type=device, is_user_annotation=name == "step", count=6, **times
        )

    rows = [
        cost("aten::mm", DeviceType.CPU, 4),
        cost("gemm", DeviceType.CUDA, 3),
        cost("splitk", DeviceType.CUDA, 1),
        cost("step", DeviceType.CUDA, 5),
    ]
    page = format_largest_costs(SimpleNamespace(key_averages=lambda: rows)).splitlines()
    assert "4.0 ms a step in all" in page[2]
    assert page[6:] == ["| gemm | 3.00 | 75.0% | 2 |", "| splitk | 1.00 | 25.0% | 2 |"]
