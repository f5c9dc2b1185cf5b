"""Sampling with guidance: ours against diffusers.

    python -m benchmarks.sample                      # S and M, 7 rounds
    python -m benchmarks.sample --shape S --compile --out runs/sample.json
    python -m benchmarks.sample --quick              # does it run? (a tiny network)

DDIM with classifier-free guidance of scale 5, both halves in one batch. The text states are given,
and no image is decoded. S takes 20 steps for 2 images (6.3 M parameters, latents 4 x 16 x 16), M 5
steps for 1 image (34.9 M, 4 x 32 x 32). All begin with the same weights and the same noise.
Ours: a run is trained for one step and loaded with `ldm.load`; the allocator is as in `sample.py`.
diffusers: UNet2DConditionModel and DDIMScheduler; in bfloat16 with autocast, and with weights in
bfloat16. The ratio is to diffusers in float32, and above 1 is faster. The error is the relative RMS
of the last latents to those of diffusers in float32. --compile takes minutes on a CPU.
"""

from functools import partial
from pathlib import Path

from benchmarks import harness

BASE = "diffusers float32"
SCALE = 5.0


def main(words: list[str] | None = None) -> None:
    """Measures each shape."""
    harness.measure_shapes("sample", __doc__, words, measure)


def measure(name: str, folder: Path, args) -> tuple[str, list[harness.Row], dict]:
    """Returns the title and the rows of one shape, and no other facts."""
    import torch
    from diffusers.utils import logging

    import ldm
    from benchmarks.networks import SHAPES, make_peer, relative_rms
    from ldm.utils.allocator import reuse_freed_memory

    logging.set_verbosity_error()  # of its cast to bfloat16
    shape = SHAPES[name]
    run = train_one_step(shape, folder)

    def load(*words: str, dtype=None):
        words = ("sampler=ddim", f"guidance.scale={SCALE}", *words)
        return ldm.load(run, *words, dtype=dtype, trust="benchmarks").pipeline

    ours = {"ldm float32": load(), "ldm bfloat16": load(dtype=torch.bfloat16)}
    if args.compile:
        ours["ldm bfloat16, compiled"] = load("compile=default", dtype=torch.bfloat16)
    first = ours["ldm float32"].components
    state = {key: value.float() for key, value in first.denoiser.state_dict().items()}
    prompts, seeds = [f"prompt {i}" for i in range(shape.images)], list(range(shape.images))
    states = [first.text_encoder([text] * shape.images).tokens for text in ("", *prompts)]
    tokens = torch.cat([states[0], first.text_encoder(prompts).tokens])
    noise = torch.randn(
        shape.images, 4, shape.side, shape.side, generator=torch.Generator().manual_seed(0)
    )

    def peer(*, dtype=torch.float32, autocast: bool = False, compiled: bool = False):
        net = make_peer(first.denoiser, state).eval().to(dtype)
        if compiled:
            net.compile()
        own = tokens.to(dtype)

        def run() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return sample_peer(net, noise, own, shape.steps)

        return run

    theirs = {
        BASE: peer(),
        "diffusers bfloat16 (autocast)": peer(autocast=True),
        "diffusers bfloat16 (weights)": peer(dtype=torch.bfloat16),
    }
    if args.compile:
        theirs["diffusers bfloat16 (weights), compiled"] = peer(dtype=torch.bfloat16, compiled=True)
    variants = {label: harness.OwnProcess(run) for label, run in theirs.items()}
    for label, pipeline in ours.items():
        sample = partial(pipeline, prompts, seeds=seeds, size=shape.side, steps=shape.steps)
        variants[label] = harness.OwnProcess(sample, prepare=reuse_freed_memory)
    seconds = harness.race(variants, rounds=args.rounds, title=name)
    for variant in variants.values():
        variant.end()

    latents = {label: run() for label, run in theirs.items()}
    for label, pipeline in ours.items():
        latents[label] = sample_ours(pipeline, noise, prompts, shape.steps)
    rows = harness.compare(seconds, base=BASE)
    for row in rows:
        row["error"] = relative_rms(latents[row["variant"]], latents[BASE])
    return f"sampling, {name}", rows, {}


def train_one_step(shape, folder: Path) -> Path:
    """Returns the directory of a run of one step, whose weights are nowhere all zero."""
    from benchmarks.networks import compose_run, fill_zeros, write_blank_shards
    from ldm.config.run import build_job

    words = ("data.batch_size=1", "trainer.max_steps=1", "checkpoint.background=false")
    data = write_blank_shards(folder / "data", shape.side)
    job = build_job(compose_run(shape, data, *words), folder / "run")
    state = fill_zeros(job.module.denoiser)
    job.module.denoiser.load_state_dict(state)
    job.module.ema.module.load_state_dict(state)
    with harness.silence():
        job.trainer.fit(job.module, datamodule=job.data)
    return folder / "run"


def sample_peer(net, noise, tokens, steps: int):
    """Returns the latents that diffusers' network and scheduler make of `noise`."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = torch.cat([x, x]).to(tokens.dtype)
            out = net(both, t, tokens, return_dict=False)[0].float()
            uncond, cond = out.chunk(2)
            x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, return_dict=False)[0]
    return x


def sample_ours(pipeline, noise, prompts: list[str], steps: int):
    """Returns the last latents of our DDIM from the same noise: at t = 0 those are x0_hat."""
    last = []
    pipeline.generate_from_noise(
        noise, prompts, steps=steps, on_step=lambda i, x0_hat: last.append(x0_hat)
    )
    return last[-1]


if __name__ == "__main__":
    main()
