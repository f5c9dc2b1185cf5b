"""A training step of the denoiser: ours against diffusers.

    python -m benchmarks.train_step                  # S and M, 7 rounds
    python -m benchmarks.train_step --shape S --compile --out runs/train_step.json
    python -m benchmarks.train_step --quick          # does it run? (a tiny network)

A step is: noise, forward pass, loss, backward pass, clipping, AdamW, average of the weights.
Latents and text states are given. S has 6.3 M parameters, latents 4 x 16 x 16, text states
77 x 128 and batch 16; M has 34.9 M, 4 x 32 x 32, 77 x 256 and batch 4. Both networks begin with the
same weights; before the rounds the script checks that their outputs are the same.
Ours: memory layout, kernels, precision and allocator are as in `train.py`. diffusers: as in its
training scripts, with AdamW, EMAModel, mse_loss, clip_grad_norm_ and loss.item() in each step.
The ratio is to diffusers in float32, and above 1 is faster. --compile takes minutes on a CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from benchmarks import harness

BASE = "diffusers float32"


def main(words: list[str] | None = None) -> None:
    """Measures each shape."""
    harness.measure_shapes("train_step", __doc__, words, measure)


def measure(name: str, folder: Path, args) -> tuple[str, list[harness.Row], dict]:
    """Returns the title and the rows of one shape, and what was checked."""
    import torch

    from benchmarks.networks import (
        SHAPES,
        compose_run,
        fill_zeros,
        make_peer,
        relative_rms,
        write_blank_shards,
    )
    from ldm.config.run import build_job
    from ldm.utils.allocator import reuse_freed_memory

    shape = SHAPES[name]
    data = write_blank_shards(folder / "data", shape.side)

    def build(number: int, *words: str):
        return build_job(compose_run(shape, data, *words), folder / f"run{number}")

    ours = {
        "ldm float32": build(0, "trainer.precision=32-true"),
        "ldm bfloat16": build(1, "trainer.precision=bf16-mixed"),
    }
    if args.compile:
        words = ("trainer.precision=bf16-mixed", "compile=default")
        ours["ldm bfloat16, compiled"] = build(2, *words)
    first = ours["ldm float32"].module.denoiser
    state = fill_zeros(first)
    for job in ours.values():
        job.module.denoiser.load_state_dict(state)
        job.module.ema.module.load_state_dict(state)

    # The same inputs of all: the task and the loss read the images, the peer the latents.
    torch.manual_seed(0)
    images = torch.rand(shape.batch, 3, shape.side, shape.side) * 2 - 1
    captions = [f"caption {i}" for i in range(shape.batch)]
    module = ours["ldm float32"].module
    latents = module.components.autoencoder.encode(images)
    cond = module.components.text_encoder(captions)
    t = torch.randint(0, 1000, (shape.batch,))
    peer = make_peer(first, state)
    with torch.no_grad():
        wanted = peer(latents, t, cond.tokens, return_dict=False)[0]
        error = relative_rms(first(latents, t.float(), cond), wanted)
    assert error < 1e-5, f"the outputs differ by {error:.1e} (relative RMS)"

    variants = {
        BASE: step_peer(peer, latents, cond.tokens),
        "diffusers bfloat16": step_peer(make_peer(first, state), latents, cond.tokens, bf16=True),
    }
    if args.compile:
        compiled = make_peer(first, state)
        compiled.compile()
        variants["diffusers bfloat16, compiled"] = step_peer(
            compiled, latents, cond.tokens, bf16=True
        )
    variants = {label: harness.OwnProcess(step) for label, step in variants.items()}
    for label, job in ours.items():
        step = step_ours(job, images, captions)
        variants[label] = harness.OwnProcess(step, prepare=reuse_freed_memory)
    seconds = harness.race(variants, rounds=args.rounds, title=name, warm_up=2)
    for variant in variants.values():
        variant.end()
    parameters = sum(p.numel() for p in peer.parameters())
    title = f"training step, {name} ({parameters / 1e6:.1f} M parameters)"
    return (
        title,
        harness.compare(seconds, base=BASE),
        {"parameters": parameters, "relative_rms_of_outputs": error},
    )


def step_ours(job, images, captions: list[str]) -> Callable[[], None]:
    """Returns a step of a job of ours, without Lightning's loop."""
    fitted = job.module.make_optimizer(job.module.denoiser.parameters(), steps=10_000)
    optimizer, curve = fitted["optimizer"], fitted["lr_scheduler"]["scheduler"]
    done = 0

    def step() -> None:
        nonlocal done
        position = list(range(done * len(images), (done + 1) * len(images)))
        batch = {"images": images, "captions": captions, "position": position}
        done += 1
        train_bare(job.module, batch, optimizer, curve, job.trainer.precision_plugin, done)

    job.module.train()
    return step


def train_bare(
    module, batch: dict, optimizer, curve, precision, step: int, clock=lambda name: nullcontext()
) -> None:
    """Trains our module for one step by a loop of a few lines; clock: a context for each part."""
    import torch

    with clock("forward"), precision.train_step_context():
        loss = module.training_step(batch, step)
    with clock("zero_grad"):
        optimizer.zero_grad()
    with clock("backward"):
        loss.backward()
    with clock("clip"):
        torch.nn.utils.clip_grad_norm_(module.denoiser.parameters(), 1.0)
    with clock("optimizer"):
        optimizer.step()
        module.ema.update(module.denoiser, step=step)
    with clock("curve"):
        curve.step()


def step_peer(net, latents, tokens, *, bf16: bool = False) -> Callable[[], None]:
    """Returns a step of diffusers' training scripts."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net.train()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01)
    curve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = EMAModel(net.parameters(), decay=0.999)

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(noisy, t, tokens, return_dict=False)[0]
        loss = F.mse_loss(out.float(), noise)
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        curve.step()
        optimizer.zero_grad()
        average.step(net.parameters())

    return step


if __name__ == "__main__":
    main()
