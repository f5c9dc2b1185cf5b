"""Paint prompts with a trained run: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs

TEXTS = ("ckpt", "prompt", "prompts", "negative", "out", "autoencoder", "text_encoder")
TEXTS += ("image", "mask", "source")
texts = cli.take_text(TEXTS)


@hydra.main(config_path=cli.CONF, config_name="sample", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    cli.check(cfg, "sample")
    if cfg.n < 1:
        raise cli.UsageError(f"n={cfg.n}: it takes one picture or more")
    asked = {**{name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}, **texts}
    with cli.told_plainly():
        from ldm.build import pipelines
        from ldm.data.images import read_mask, read_square
        from ldm.images import captioned, save_png, tile, to_pil
        from ldm.painting import paint

        prompts = cli.read_prompts(asked)
        restored = pipelines.restore(cfg, cli.needed(asked, "ckpt"), asked)
        size = cfg.size or restored.size
        given = {"image": read_square, "mask": partial(read_mask, of=asked["image"])}
        given = {k: read(asked[k], size)[None] for k, read in given.items() if asked[k]}
        given |= {k: asked[k] for k in ("negative", "source")}
        given |= {k: cfg[k] for k in ("strength", "paste")}
        jobs = [(p, cfg.seed + i) for p in prompts for i in range(cfg.n)]
        how = {"steps": cfg.steps, "batch": cfg.batch, "previews": cfg.previews}
        pipeline = partial(restored.pipeline, size=size, **given)
        images, guesses = paint(pipeline, jobs, decode=restored.pipeline.decode, **how)
    out = Path(asked["out"] or runs.picture_path(restored.path, prompts[0])).with_suffix(".png")
    settings = {
        "negative": asked["negative"],
        **{k: asked[k] for k in ("image", "mask", "source") if asked[k]},
        "task": restored.task,
        **{k: cfg[k] for k in ("strength", "paste")},
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
    if guesses:
        on_the_way = out.with_name(f"{out.stem}_previews.png")
        rows = [guess for row in guesses for guess in row]
        save_png(tile(rows, columns=len(guesses[0])), on_the_way, facts)
        print(f"the model's guesses on the way: {on_the_way}")
    if len(images) > 1:
        print(f"{len(images)} pictures beside {out}")
    print(out)


if __name__ == "__main__":
    cli.run(main, "sample")
