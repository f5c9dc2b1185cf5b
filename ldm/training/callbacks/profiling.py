"""A profile of a few training steps, for `profile=true`."""

import os
from pathlib import Path

import lightning as L
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from ldm.utils.files import write_text

CPU = DeviceType.CPU
STEPS_BEFORE_PROFILE = 5  # in which kernels are chosen and memory is reserved
PROFILED_STEPS = 3


class StepProfiler(L.Callback):
    """Writes a trace of `PROFILED_STEPS` steps, and a page of their largest costs, to `folder`.

    Rank 0 does so, some steps after the training begins or resumes; the training goes on. A disk
    without room gives a line, and no profile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profiler: profile | None = None  # while it records

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begins_after = trainer.global_step + STEPS_BEFORE_PROFILE
        self.seen = trainer.global_step
        steps = STEPS_BEFORE_PROFILE + 1 + PROFILED_STEPS
        if trainer.is_global_zero and 0 < trainer.max_steps < trainer.global_step + steps:
            print(f"profile: there is none, as it takes {steps} training steps", flush=True)
            self.begins_after = -1

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.seen or not trainer.is_global_zero:
            return  # a part of a step, or another rank's affair
        self.seen = step
        if step == self.begins_after:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of torch's profiler
            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            # The first step of a profile also has the cost of its beginning.
            plan = schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
            self.profiler = profile(activities=kinds, schedule=plan, on_trace_ready=self._write)
            self.profiler.start()
        elif self.profiler is not None:
            self.profiler.step()
            if step > self.begins_after + PROFILED_STEPS:
                self._stop()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _write(self, recorded: profile) -> None:
        page, trace = self.folder / "costs.md", self.folder / "trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            write_text(page, format_largest_costs(recorded))
            print(f"profile: the ten largest costs are in {page}, the trace in {trace}", flush=True)
        except (OSError, RuntimeError) as error:
            print(f"profile: {self.folder} cannot be written: {error}", flush=True)


def format_largest_costs(recorded: profile) -> str:
    """Returns a page of markdown: the ten operations with the most time of their own."""
    rows = recorded.key_averages()
    # A kernel's time is also that of the operation that started it, and of annotations around it.
    kernels = [row for row in rows if row.device_type != CPU and not row.is_user_annotation]
    kind, own = ("GPU", "self_device_time_total") if kernels else ("CPU", "self_cpu_time_total")
    rows = sorted(kernels or rows, key=lambda row: getattr(row, own), reverse=True)
    total = sum(getattr(row, own) for row in rows)  # microseconds
    lines = [
        f"# The ten largest costs of {PROFILED_STEPS} training steps",
        "",
        f"{kind} time of each operation itself, without what it calls: "
        f"{total / PROFILED_STEPS / 1000:.1f} ms a step in all. "
        "`trace.json.gz` shows every call: open it in https://ui.perfetto.dev or chrome://tracing.",
        "",
        f"| operation | {kind} ms a step | share | calls a step |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows[:10]:
        spent = getattr(row, own)
        name = row.key.replace("|", "\\|")[:100]
        lines.append(
            f"| {name} | {spent / PROFILED_STEPS / 1000:.2f} | {spent / total:.1%} | "
            f"{row.count / PROFILED_STEPS:.0f} |"
        )
    return "\n".join(lines) + "\n"
