"""Paint prompts with a trained run: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

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
        from ldm import films, gallery
        from ldm.build.painting import painted

        kind = films.kind(asked["out"])
        prompts = cli.read_prompts(asked)
        jobs = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.n)]
        ckpts = list(cfg.cascade) or [cli.needed(asked, "ckpt")]
        done = painted(cfg, ckpts, asked, jobs)
    out = Path(asked["out"] or runs.picture_path(done.restored.path, prompts[0])).with_suffix(kind)
    columns = None if cfg.n == 1 else cfg.n
    more = {"guesses": done.guesses, "columns": columns, "fps": cfg.fps}
    print(gallery.save(done.images, jobs, out, done.settings, **more))


if __name__ == "__main__":
    cli.run(main, "sample")
