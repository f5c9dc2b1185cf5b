"""Paint prompts with a trained run: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli
from ldm.asked import TEXTS, check_places, checked, runs_of

texts = cli.take_text(TEXTS)


@hydra.main(config_path=cli.CONF, config_name="sample", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    asked = {**{name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}, **texts}
    asked = checked(cfg, asked, texts)
    with cli.told_plainly():
        prompts = cli.read_prompts(asked)
        ckpts = runs_of(cfg) or [cli.needed(asked, "ckpt")]
        check_places(cfg, *ckpts)
        from ldm import gallery
        from ldm.build.painting import painted

        jobs = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.n)]
        done = painted(cfg, ckpts, asked, jobs)
        columns = None if cfg.n == 1 else cfg.n
        more = {"guesses": done.guesses, "columns": columns, "fps": cfg.fps}
        more["overwrite"] = cfg.overwrite
        print(gallery.save(done.images, jobs, done.out, done.settings, **more))


if __name__ == "__main__":
    cli.run(main, "sample")
