"""ldm sample ckpt=runs/my-run prompt="...": images from prompts, with a trained run; see --help."""

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.config import command_line
from ldm.config.sample_options import TEXTS, check_places, checked, runs_of

texts = command_line.take_text(TEXTS)


@hydra.main(config_path=command_line.CONF, config_name="sample", version_base="1.3")
def sample(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    asked = {**{name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}, **texts}
    asked = checked(cfg, asked, texts)
    with command_line.told_plainly():
        prompts = command_line.read_prompts(asked)
        ckpts = runs_of(cfg) or [command_line.needed(asked, "ckpt")]
        check_places(cfg, *ckpts)
        from ldm.config.generation import painted
        from ldm.inference import outputs

        jobs = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.n)]
        done = painted(cfg, ckpts, asked, jobs)
        columns = None if cfg.n == 1 else cfg.n
        more = {"guesses": done.guesses, "columns": columns, "fps": cfg.fps}
        more["overwrite"] = cfg.overwrite
        print(outputs.save(done.images, jobs, done.out, done.settings, **more))


def main() -> None:
    """Run the command."""
    command_line.run(sample, "sample")


if __name__ == "__main__":
    main()
