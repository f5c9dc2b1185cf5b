"""Paint prompts with a trained run: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs

TEXTS = ("ckpt", "prompt", "prompts", "negative", "out", "autoencoder", "text_encoder")
texts = cli.take_text(TEXTS)


@hydra.main(config_path=cli.CONF, config_name="sample", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    cli.check(cfg, "sample")
    if cfg.n < 1:
        raise cli.UsageError(f"n={cfg.n}: it takes one picture or more")
    asked = {**{name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}, **texts}
    with cli.told_plainly():
        from tqdm import tqdm

        from ldm.build import parts
        from ldm.images import captioned, save_png, tile, to_pil

        prompts = cli.read_prompts(asked)
        restored = parts.restore(cfg, cli.needed(asked, "ckpt"), asked)
        size = cfg.size or restored.size
        jobs = [(p, cfg.seed + i) for p in prompts for i in range(cfg.n)]
        images = []
        with tqdm(total=len(jobs) * cfg.steps, desc="Sampling", unit="step") as bar:
            for first in range(0, len(jobs), cfg.batch):
                part = jobs[first : first + cfg.batch]
                images += restored.pipeline(
                    [prompt for prompt, _ in part],
                    seeds=[seed for _, seed in part],
                    size=size,
                    steps=cfg.steps,
                    negative=asked["negative"],
                    on_step=lambda i, x0_hat: bar.update(len(part)),  # noqa: B023 (called at once)
                ).cpu()
    out = Path(asked["out"] or runs.picture_path(restored.path, prompts[0])).with_suffix(".png")
    settings = {
        "negative": asked["negative"],
        "steps": cfg.steps,
        "size": size,
        **restored.settings,
        "ckpt": str(restored.path),
        "step": restored.step,
    }
    for i, (image, (prompt, seed)) in enumerate(zip(images, jobs, strict=True)):
        single = out.with_name(f"{out.stem}_{i:03d}.png")
        save_png(to_pil(image), single, {"prompt": prompt, "seed": seed, **settings})
    facts = {"prompt": [p for p, _ in jobs], "seed": [s for _, s in jobs], **settings}
    grid = tile(images)
    if len(prompts) > 1:
        grid = captioned(images, facts["prompt"], columns=None if cfg.n == 1 else cfg.n)
    save_png(grid, out, facts)
    print(f"{len(images)} pictures beside {out}")
    print(out)


if __name__ == "__main__":
    cli.run(main, "sample")
