"""The most memory that a training takes.

    python -m benchmarks.memory                      # about 10 GiB of memory and disk, minutes
    python -m benchmarks.memory --model nano
    python -m benchmarks.memory --quick              # does it run? (model=nano)

Each row is a process of its own; the number is the peak of its resident memory (RSS), in GiB.
model=small has 220 M parameters, 16 bytes each in training. The rows show what a checkpoint adds,
written in the background and in the foreground, and one step of the same network in ldm and in
diffusers by a bare loop (float32, AdamW, an average of the weights, batch 1).
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import harness

TRAIN = harness.ROOT / "train.py"
CONTEXT, SIDE = 128, 8  # width of the text states, side of the latents


def main(words: list[str] | None = None) -> None:
    """Measures the processes."""
    parser = harness.make_parser("memory", __doc__, rounds=1)
    parser.add_argument("--model", default="small", help="option of conf/model (default: small)")
    harness.add_only(parser)
    parser.add_argument("--bare", choices=["ldm", "diffusers"], help="(one step in this process)")
    args = harness.parse(parser, words)
    if args.quick:
        args.model = "nano"
    if args.bare:
        take_step(args.bare, args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        variants = harness.select(list_variants(Path(folder), args), args, parser)
        found = harness.race(variants, rounds=args.rounds, title="memory", warm_up=0)
    rows = [harness.summarize(name, values, unit="GiB") for name, values in found.items()]
    harness.Report(args).add(f"peak memory, model={args.model}", rows)


def list_variants(folder: Path, args) -> dict:
    """Returns what runs each process once, and gives its peak in GiB."""
    common = [
        "logger=csv", "eval=none", "features=none", "samples.n=0", "validate_first=false",
        "trainer.limit_val_batches=1", "data.val_batch_size=8", "data.workers=0",
        "data.count=64", "data.val_count=64", f"data.folder={folder}/scenes",
    ]  # fmt: skip

    def python(*words: object) -> float:
        return harness.run_process(words, cwd=folder).peak_mib / 1024

    def train(*words: str) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            return python(TRAIN, "name=run", f"hydra.run.dir={runs}", *common, *words)

    one = [f"model={args.model}", "data.batch_size=1", "trainer.max_steps=2"]
    variants = {
        "import torch, lightning": partial(python, "-c", "import torch, lightning"),
        **{
            f"a bare step, {side}": partial(
                python, "-m", "benchmarks.memory", "--bare", side, "--model", args.model
            )
            for side in ("ldm", "diffusers")
        },
        **{
            f"train.py, checkpoint.background={value}": partial(
                train, *one, f"checkpoint.background={value}"
            )
            for value in ("true", "false")
        },
        "train.py as shipped": partial(train, *one),
    }
    if not args.quick:
        many = ["trainer.max_steps=40", "checkpoint.every=5"]
        variants["train.py model=nano, 12 steps of 32"] = partial(train, "trainer.max_steps=12")
        variants["train.py model=nano, 40 steps, 8 checkpoints"] = partial(train, *many)
    return variants


def take_step(side: str, model: str) -> None:
    """Takes one training step by a bare loop in this process."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ldm.config.search_path import CONF_DIR
    from ldm.diffusion.conditioning import Condition
    from ldm.models.diffusers_format import export_unet_config
    from ldm.training.ema import EMA

    cfg = OmegaConf.load(Path(CONF_DIR, "model", f"{model}.yaml"))
    cfg.positional_waves = 0  # diffusers has none
    sizes = {"in_channels": 4, "out_channels": 4, "context_dim": CONTEXT}
    x, t = torch.randn(1, 4, SIDE, SIDE), torch.tensor([500.0])
    tokens = torch.randn(1, 77, CONTEXT)
    if side == "ldm":
        net = instantiate(cfg, **sizes, _convert_="all")
        average = EMA(net, decay=0.999)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        out = net(x, t, Condition(tokens=tokens))
    else:
        from diffusers import UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        with torch.device("meta"):
            shape = export_unet_config(instantiate(cfg, **sizes, _convert_="all"))
        net = UNet2DConditionModel(**shape)
        average = EMAModel(net.parameters(), decay=0.999)
        optimizer = torch.optim.AdamW(net.parameters())
        out = net(x, t, tokens, return_dict=False)[0]
    out.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    average.update(net, step=1) if side == "ldm" else average.step(net.parameters())


if __name__ == "__main__":
    main()
