"""Paint prompts with a trained run: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs

TEXTS = ("ckpt", "prompt", "prompts", "negative", "out", "autoencoder", "text_encoder")
TEXTS += ("image", "mask", "source", "style", "style_encoder")
texts = cli.take_text(TEXTS)


@hydra.main(config_path=cli.CONF, config_name="sample", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    cli.check(cfg, "sample")
    if cfg.n < 1:
        raise cli.UsageError(f"n={cfg.n}: it takes one picture or more")
    asked = {**{name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}, **texts}
    with cli.told_plainly():
        import torch

        from ldm import films, requests
        from ldm.build import pipelines
        from ldm.data.images import read_square
        from ldm.images import captioned, save_png, tile, to_pil
        from ldm.painting import paint

        kind = films.kind(asked["out"])
        prompts = cli.read_prompts(asked)
        jobs = [(p, cfg.seed + i) for p in prompts for i in range(cfg.n)]
        how = {"steps": cfg.steps, "batch": cfg.batch, "previews": cfg.previews}
        images: list[torch.Tensor] = []
        ckpts = list(cfg.cascade) or [cli.needed(asked, "ckpt")]
        for restored in pipelines.cascade(cfg, ckpts, asked):
            pipeline, more = restored.pipeline, {}
            if images:
                given = requests.continued(pipeline, torch.stack(images))
            else:
                files = {k: asked[k] for k in ("image", "mask")}
                size = cfg.size or restored.size
                given = requests.read(pipeline, size=size, pad=cli.sides(cfg.pad), **files)
                more = {k: cfg[k] for k in ("strength", "paste")} | {"source": asked["source"]}
                if asked["style"]:
                    more["style"] = read_square(asked["style"], restored.size)[None]
            call = partial(pipeline, size=given.size, negative=asked["negative"], **more)
            how |= {"decode": pipeline.decode, "pictures": given.pictures()}
            images, guesses = paint(call, jobs, **how)
            images = given.cut(images)
    out = Path(asked["out"] or runs.picture_path(restored.path, prompts[0])).with_suffix(".png")
    settings = {
        "negative": asked["negative"],
        **{k: asked[k] for k in ("image", "mask", "source", "style") if asked[k]},
        **({"cascade": list(cfg.cascade)} if cfg.cascade else {}),
        "task": restored.task,
        **{k: cfg[k] for k in ("strength", "paste")},
        "pad": cli.sides(cfg.pad),
        "steps": cfg.steps,
        "size": list(images[0].shape[-2:]),
        **restored.settings,
        "ckpt": str(restored.path),
        "step": restored.step,
    }
    moving = images[0].ndim == 4
    if moving:
        settings |= {"frames": images[0].shape[1], "fps": cfg.fps}
    singles = [{"prompt": prompt, "seed": seed, **settings} for prompt, seed in jobs]
    facts = {"prompt": [p for p, _ in jobs], "seed": [s for _, s in jobs], **settings}
    if moving:
        films.save(images, out.with_suffix(kind), singles, facts, fps=cfg.fps)
        images = [films.strip(video) for video in images]
        guesses = [[films.strip(video) for video in row] for row in guesses]
    for i, (image, single) in enumerate(zip(images, singles, strict=True)):
        save_png(to_pil(image), out.with_name(f"{out.stem}_{i:03d}.png"), single)
    grid = tile(images, columns=1 if moving else None)
    if len(prompts) > 1:
        grid = captioned(images, facts["prompt"], columns=None if cfg.n == 1 else cfg.n)
    save_png(grid, out, facts)
    if guesses:
        on_the_way = out.with_name(f"{out.stem}_previews.png")
        rows = [guess for row in guesses for guess in row]
        save_png(tile(rows, columns=len(guesses[0])), on_the_way, facts)
        print(f"the model's guesses on the way: {on_the_way}")
    if len(images) > 1:
        print(f"{len(images)} {'videos' if moving else 'pictures'} beside {out}")
    print(out.with_suffix(kind) if moving else out)


if __name__ == "__main__":
    cli.run(main, "sample")
