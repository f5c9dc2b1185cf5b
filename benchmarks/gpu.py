"""What only a GPU shows, within some 12 minutes of one H200: see benchmarks/gpu.sh.

    benchmarks/gpu.sh                                # all parts; writes docs/benchmarks_gpu.md
    benchmarks/gpu.sh --parts train256 sampling --minutes 6 --out runs/gpu.md
    benchmarks/gpu.sh --tiny                         # does it run? tiny networks, also on a CPU

Every part is a process with a time limit: what fails or takes too long costs its own numbers alone.
Nothing is installed: a part that needs a package which is not there is left out with a line.
The network is Stable Diffusion 1.x's UNet (859.5 M parameters) with random weights; latents of
4 x 32 x 32 (256 px) and 4 x 64 x 64 (512 px) and text states of 77 x 768 are given. A training step
is: noise, forward pass, loss, backward pass, clipping, fused AdamW, average of the weights.
"""

import argparse
import gc
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import scaled_linear
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.diffusion.timesteps import PowerTimestepSampler
from ldm.diffusion.weightings import UniformWeighting
from ldm.inference.components import Components
from ldm.inference.pipeline import Pipeline
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.compilation import compile_network
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.step_clock import count_forward_flops

ROOT = Path(__file__).parent.parent
PEAK = 790e12  # FLOP/s: a dense bfloat16 product of 8192 x 8192 matrices on an H200
AIMS = {256: 588, 512: 131}  # images/s: 40 % of PEAK
TINY = {
    "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [False, True], "heads": 2,
    "groups": 4,
}  # fmt: skip
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Row = dict[str, object]


class NotHereError(Exception):
    """Something that a part needs is not on this machine."""


# ---------------------------------------------------------------- what is measured


class GivenText(torch.nn.Module):
    """A text encoder that returns the same states for every caption."""

    names, pooled_width, truncated, max_length = (), 0, 0, 77

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("states", torch.randn(77, width))

    def forward(self, captions) -> Condition:
        return Condition(tokens=self.states.expand(len(captions), -1, -1))

    def null(self, n: int) -> Condition:
        return self([""] * n)


def make_unet(tiny: bool, **more) -> UNet:
    """Returns the network; no layer begins with zeros, as trained ones have none."""
    torch.manual_seed(0)
    width = 16 if tiny else 768
    sizes = TINY if tiny else {}
    with DEVICE:
        net = UNet(in_channels=4, out_channels=4, context_dim=width, **sizes, **more)
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net.to(memory_format=torch.channels_last)


def make_objective() -> Objective:
    return Objective(
        scaled_linear(),
        Prediction("eps"),
        weighting=UniformWeighting(),
        timestep_sampler=PowerTimestepSampler(power=1.0),
    ).to(DEVICE)


def make_batch(n: int, pixels: int, width: int) -> tuple[torch.Tensor, Condition]:
    side = pixels // 8
    x0 = torch.randn(n, 4, side, side, device=DEVICE)
    x0 = x0.contiguous(memory_format=torch.channels_last)
    return x0, Condition(tokens=torch.randn(n, 77, width, device=DEVICE))


def autocast(dtype: torch.dtype | None):
    return torch.autocast(DEVICE.type, dtype) if dtype else nullcontext()


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def time_calls(call: Callable[[], object], *, times: int) -> float:
    """Returns the seconds of one call, the mean over `times`."""
    wait()
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - began) / times


def read_peak_memory() -> float | None:
    """Returns the peak of the device's memory since the last reset, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if GPU else None


class Step:
    """A training step of ours; the text states and the latents are given."""

    def __init__(self, net: UNet, pixels: int, batch: int, dtype: torch.dtype | None) -> None:
        self.net, self.dtype, self.objective = net, dtype, make_objective()
        self.ema = EMA(net, decay=0.9999)
        # As ldm.training.optimizers.AdamW, which needs Lightning.
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        self.x0, self.cond = make_batch(batch, pixels, net.context_dim)

    def __call__(self) -> torch.Tensor:
        loss = self.learn()
        self.update()
        return loss

    def learn(self) -> torch.Tensor:
        """The forward and the backward pass."""
        x0 = self.x0
        t, eps = torch.rand(len(x0), device=DEVICE), torch.randn_like(x0)
        with autocast(self.dtype):
            loss = self.objective.loss_at(self.net, x0, self.cond, t=t, eps=eps).mean()
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clipping, optimizer and average."""
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.net, step=1000)


def measure_step(label: str, step: Callable[[], object], images: int, flops: float) -> Row:
    """Returns speed and peak memory of a training step; its first call is timed alone."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    first = time_calls(step, times=1)
    seconds = time_calls(step, times=2)
    seconds = time_calls(step, times=max(2, min(20, round(4 / seconds))) if GPU else 1)
    rate = flops * images / seconds
    return {
        "variant": label,
        "images": images,
        "ms a step": seconds * 1e3,
        "images/s": images / seconds,
        "TFLOP/s": rate / 1e12,
        "% of 790": 100 * rate / PEAK if GPU else None,
        "peak GiB": read_peak_memory(),
        "first step, s": first,
    }


def count_step_flops(net: UNet, pixels: int) -> float:
    """Returns the FLOPs of a training step for one image: three forward passes."""
    x0, cond = make_batch(1, pixels, net.context_dim)
    return 3 * count_forward_flops(net, x0, torch.zeros(1, device=DEVICE), cond)


def try_batches(run: Callable[[int], Row], batch: int) -> Row:
    """Returns the row of the largest of batch, batch / 2, .. that fits in memory."""
    while True:
        try:
            return run(batch)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        free_memory()  # here: the exception held the tensors


def free_memory() -> None:
    """Gives the device's memory back; a compiled network is part of a cycle of references."""
    gc.collect()
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- the parts


def run_tests(tiny: bool) -> Iterator[Row]:
    """The tests that are marked gpu."""
    for package in ("pytest", "lightning", "hydra"):
        if find_spec(package) is None:
            raise NotHereError(f"the package {package} is not installed")
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    command += map(str, sorted(tests))  # collecting all tests takes a minute
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    yield {"pytest -m gpu": (done.stdout.strip().splitlines() or ["no output"])[-1]}


def train(pixels: int, batch: int, tiny: bool) -> Iterator[Row]:
    """Training steps in bfloat16, plain and compiled, and in float32 with TF32."""
    pixels, batch = (64, 2) if tiny else (pixels, batch)
    flops = count_step_flops(make_unet(tiny), pixels)
    variants = [("bfloat16", torch.bfloat16, None), ("float32 (TF32)", None, None)]
    if not tiny:  # a CPU compiles for minutes
        variants.insert(1, ("bfloat16, compile=default", torch.bfloat16, "default"))
        if pixels == 256:
            variants.append(("bfloat16, reduce-overhead", torch.bfloat16, "reduce-overhead"))
    for label, dtype, mode in variants:

        def measure(n: int, label=label, dtype=dtype, mode=mode) -> Row:
            net = make_unet(tiny)
            step = Step(net, pixels, n, dtype)
            if mode is not None:
                compile_network(net, mode)
            row = measure_step(label, step, n, flops)
            row["clip, AdamW and EMA, ms"] = 1e3 * time_calls(step.update, times=5)
            row["aim, images/s"] = AIMS.get(pixels)
            return row

        yield try_batches(measure, batch if dtype else max(batch // 2, 1))
        free_memory()


def train_peer(tiny: bool) -> Iterator[Row]:
    """The loop of diffusers' training scripts: autocast, AdamW, EMAModel, loss.item()."""
    if find_spec("diffusers") is None:
        raise NotHereError("the package diffusers is not installed")
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    sizes = {"cross_attention_dim": 768}
    if tiny:
        kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        sizes = {"cross_attention_dim": 16, "block_out_channels": (16, 32), **kinds}
        sizes |= {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 2}
    pixels, batch = (64, 2) if tiny else (256, 256)
    flops = count_step_flops(make_unet(tiny), pixels)

    def measure(n: int) -> Row:
        with DEVICE:
            net = UNet2DConditionModel(**sizes)
        average = EMAModel(net.parameters(), decay=0.9999)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        x0, cond = make_batch(n, pixels, sizes["cross_attention_dim"])
        alphas = scaled_linear().to(DEVICE)

        def step() -> None:
            t, eps = torch.randint(0, 1000, (n,), device=DEVICE), torch.randn_like(x0)
            alpha, sigma = alphas(t / 1000)
            x_t = alpha.float()[:, None, None, None] * x0 + sigma.float()[:, None, None, None] * eps
            with autocast(torch.bfloat16):
                out = net(x_t, t, cond.tokens, return_dict=False)[0]
                loss = F.mse_loss(out.float(), eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.step(net.parameters())
            loss.item()

        return measure_step(f"diffusers bfloat16, {pixels} px", step, n, flops)

    yield try_batches(measure, batch)


def sample(tiny: bool) -> Iterator[Row]:
    """50 DDIM steps with guidance at 512 px, and the autoencoder's decoding."""
    pixels, steps = (64, 2) if tiny else (512, 50)
    more = {"channels": 16, "multipliers": [1, 1, 1, 1], "groups": 4} if tiny else {}
    with DEVICE:
        autoencoder = AutoencoderKL(**more).eval()
    variants = [("bfloat16", None, [1, 2] if tiny else [1, 16])]
    if not tiny:
        variants += [("compile=default", "default", [1, 16])]
        variants += [("compile=reduce-overhead", "reduce-overhead", [1])]
    for label, mode, counts in variants:
        net = make_unet(tiny).eval()  # autocast keeps its copies of weights with gradients alone
        text = GivenText(net.context_dim).to(DEVICE)
        parts = Components(net, autoencoder, text, None, make_objective(), TextToImage())
        pipeline = Pipeline(
            parts, DDIMSampler(), ClassifierFreeGuidance(scale=5.0), dtype=torch.bfloat16
        )
        if mode is not None:
            compile_network(net, mode)
        for n in counts:
            if GPU:
                torch.cuda.reset_peak_memory_stats()

            def call(pipeline=pipeline, n=n) -> None:
                how = {"seeds": list(range(n)), "size": pixels, "steps": steps}
                pipeline([f"prompt {i}" for i in range(n)], **how)

            first = time_calls(call, times=1)
            seconds = time_calls(call, times=3 if n == 1 else 1)
            row = {"variant": label, "images": n, "ms": seconds * 1e3, "images/s": n / seconds}
            aim = {1: "<= 400 ms", 16: ">= 4 images/s"}.get(n)
            yield row | {"aim": aim, "peak GiB": read_peak_memory(), "first call, s": first}


def compare_precisions(tiny: bool) -> Iterator[Row]:
    """The outputs and losses of one network in several precisions, against plain float32."""
    pixels, n = (64, 2) if tiny else (256, 8)
    net = make_unet(tiny)
    x0, cond = make_batch(n, pixels, net.context_dim)
    objective = make_objective()
    t, eps = torch.linspace(0.05, 0.95, n, device=DEVICE), torch.randn_like(x0)

    def learn(dtype) -> tuple[torch.Tensor, torch.Tensor]:
        net.zero_grad()
        with autocast(dtype):
            loss = objective.loss_at(net, x0, cond, t=t, eps=eps).mean()
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten().float() for p in net.parameters()])

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    right_loss, right = learn(None)
    torch.backends.cudnn.allow_tf32 = True
    for label, precision, dtype, mode in (
        ("float32 (TF32)", "high", None, None),
        ("bfloat16", "high", torch.bfloat16, None),
        ("bfloat16, compile=default", "high", torch.bfloat16, "default"),
    ):
        if mode is not None and tiny:
            continue
        torch.set_float32_matmul_precision(precision)
        if mode is not None:
            compile_network(net, mode)
        loss, gradient = learn(dtype)
        yield {
            "variant": label,
            "loss": float(loss),
            "relative difference of the loss": float((loss - right_loss).abs() / right_loss),
            "relative RMS of the gradient": float((gradient - right).norm() / right.norm()),
        }


def join_one_rank(tiny: bool) -> Iterator[Row]:
    """DDP over NCCL with one rank: the same loss as alone, and its time."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    pixels, n = (64, 2) if tiny else (256, 64)
    backend = "nccl" if GPU else "gloo"
    if GPU:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/s", rank=0, world_size=1)
        try:
            total = torch.ones(4, device=DEVICE)
            dist.all_reduce(total)
            for label in ("alone", f"DDP, {backend}"):
                net = make_unet(tiny)
                step = Step(net, pixels, n, torch.bfloat16)
                if label != "alone":
                    ids = [0] if GPU else None
                    step.net = DistributedDataParallel(
                        net, device_ids=ids, gradient_as_bucket_view=True
                    )
                torch.manual_seed(1)
                loss = float(step.learn())
                seconds = time_calls(step.learn, times=1 if tiny else 5)
                yield {"variant": label, "loss": loss, "ms forward and backward": 1e3 * seconds}
                del net, step
                free_memory()
        finally:
            dist.destroy_process_group()


def checkpoint_gradients(tiny: bool) -> Iterator[Row]:
    """A training step at 512 px with and without `model.checkpointing`."""
    import inspect

    if "checkpointing" not in inspect.signature(UNet).parameters:
        raise NotHereError("this UNet has no checkpointing")
    pixels, n = (64, 2) if tiny else (512, 32)
    flops = count_step_flops(make_unet(tiny), pixels)
    for label, more in (("none", {}), ("all", {"checkpointing": "all"})):
        step = Step(make_unet(tiny, **more), pixels, n, torch.bfloat16)
        yield measure_step(f"checkpointing: {label}", step, n, flops)
        del step
        free_memory()


# Name: title, function, limit in seconds. A lack of time cuts the last ones.
PARTS: dict[str, tuple[str, Callable[[bool], Iterator[Row]], int]] = {
    "tests": ("Tests that need a GPU", run_tests, 150),
    "train256": ("Training, 256 px", lambda tiny: train(256, 256, tiny), 240),
    "peer": ("Training by diffusers' loop", train_peer, 60),
    "checkpointing": ("Gradient checkpointing, 512 px", checkpoint_gradients, 60),
    "nccl": ("One rank", join_one_rank, 60),
    "sampling": ("Sampling, 512 px, 50 steps, guidance", sample, 210),
    "train512": ("Training, 512 px", lambda tiny: train(512, 64, tiny), 180),
    "precision": ("Precision", compare_precisions, 90),
}


# ---------------------------------------------------------------- the page


def main(words: list[str] | None = None) -> None:
    """Runs the parts one after another; rewrites the page after each."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=11.0, help="for all parts (default: 11)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="docs/benchmarks_gpu.md; with "
                        "--tiny: none")  # fmt: skip
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.part is not None:
        run_part(args.part, args.tiny)
        return
    if not GPU and not args.tiny:
        parser.error("torch finds no GPU here: give --tiny for a trial on the CPU")
    out = args.out or (None if args.tiny else ROOT / "docs" / "benchmarks_gpu.md")
    deadline, sections = time.monotonic() + 60 * args.minutes, []
    facts = describe_measurement(args.tiny)
    for name in args.parts:
        sections.append(start_part(name, args.tiny, deadline - time.monotonic()))
        print(sections[-1], flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(["# Measured on a GPU", "", *facts, "", *sections]))
    print(out or "", flush=True)


def start_part(name: str, tiny: bool, left: float) -> str:
    """Returns the section of one part, which runs in a process of its own."""
    title, _, limit = PARTS[name]
    limit, began = min(600 if tiny else limit, left), time.monotonic()
    if limit < 10:
        return format_section(title, [], "left out: the time is over")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "rows.jsonl")
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name]
        command += ["--tiny"] if tiny else []
        environment = os.environ | {"LDM_BENCHMARK_ROWS": str(found)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
            note = "" if code == 0 else f"it failed with exit code {code} (its output says why)"
        except subprocess.TimeoutExpired:
            note = f"stopped after {limit:.0f} s: what follows is missing"
        finally:
            with suppress(ProcessLookupError):  # also what it has started, such as pytest
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = found.read_text().splitlines() if found.is_file() else []
    rows = [json.loads(line) for line in lines]
    missing = [row.pop("_missing") for row in rows if "_missing" in row]
    if missing:
        note = f"left out: {missing[0]}"
    seconds = f"{time.monotonic() - began:.0f} s"
    return format_section(title, [row for row in rows if row], note or seconds)


def run_part(name: str, tiny: bool) -> None:
    """Measures one part; appends each row to the file of the process that started it."""
    torch.set_float32_matmul_precision("high")  # as trainer.precision=auto
    with open(os.environ["LDM_BENCHMARK_ROWS"], "a") as file:
        try:
            for row in PARTS[name][1](tiny):
                print(json.dumps(row), file=file, flush=True)
        except NotHereError as error:
            print(json.dumps({"_missing": str(error)}), file=file)


def format_section(title: str, rows: list[Row], note: str) -> str:
    """Returns a section in Markdown."""
    lines = [f"## {title}", ""]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    if keys:
        lines += [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
        lines += [f"| {' | '.join(format_number(row.get(key)) for key in keys)} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, f"({note})", ""])


def format_number(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.4g}"


def describe_measurement(tiny: bool) -> list[str]:
    """Returns the lines of what was measured, on what, with which versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if GPU else platform.processor() or "CPU"
    memory = f", {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if GPU else ""
    size = " Tiny networks: no number here says anything." if tiny else ""
    return [
        f"By `benchmarks/gpu.sh`, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}.{size}",
        "",
        f"{name}{memory}; torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
        f"{torch.backends.cudnn.version()}, Python {platform.python_version()}.",
        "",
        *(__doc__ or "").strip().splitlines()[-5:],
    ]


if __name__ == "__main__":
    main()
