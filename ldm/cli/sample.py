"""ldm sample ckpt=runs/my-run prompt="...": images from prompts, with a trained run; see --help."""

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    read_prompts,
    require_option,
    run_command,
)
from ldm.config.sample_options import (
    SAMPLE_TEXT_OPTIONS,
    check_checkpoints_and_device,
    check_sample_options,
    list_cascade_runs,
)

texts = pop_text_options(SAMPLE_TEXT_OPTIONS)


@hydra.main(config_path=command_line.CONF_DIR, config_name="sample", version_base="1.3")
def sample(cfg: DictConfig) -> None:
    """Compose, restore, sample, save."""
    asked = {
        **{name: cfg[name] for name in SAMPLE_TEXT_OPTIONS if not OmegaConf.is_missing(cfg, name)},
        **texts,
    }
    asked = check_sample_options(cfg, asked, texts)
    with convert_to_usage_errors():
        prompts = read_prompts(asked)
        ckpts = list_cascade_runs(cfg) or [require_option(asked, "ckpt")]
        check_checkpoints_and_device(cfg, *ckpts)
        from ldm.config.generation import generate_samples
        from ldm.inference.outputs import save_outputs

        jobs = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.n)]
        done = generate_samples(cfg, ckpts, asked, jobs)
        columns = None if cfg.n == 1 else cfg.n
        more = {"previews": done.previews, "columns": columns, "fps": cfg.fps}
        more["overwrite"] = cfg.overwrite
        print(save_outputs(done.images, jobs, done.out, done.settings, **more))


def main() -> None:
    """Run the command."""
    run_command(sample, "sample")


if __name__ == "__main__":
    main()
