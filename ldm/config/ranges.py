"""Which numbers each setting takes: one table, looked up before anything is imported or written.

A key of `conf/` is found by its whole name, else by its first and last part (`guidance.inner.scale`
is `guidance.scale`). A key that is a command's own may be told apart with the command's name
(`augment keep`). Null is taken where the default is null or the table has NULL. A setting of a
class from elsewhere is not in the table: it must be finite, and nothing else is known of it.
"""

import math
from collections.abc import Iterator

from ldm.config.rules import Exactly, Listed, Numbers, spoken

# What a `_target_` begins with whose settings are known.
OURS = ("ldm.", "lightning.", "datetime.", "hydra_plugins.")

Rule = tuple[Numbers | Listed | Exactly, ...]  # one of which is enough


def whole(interval: str) -> Numbers:
    """The integers of an interval."""
    return Numbers(interval, whole=True)


NULL = Exactly(None)
COUNT = whole("[1, 1000000000]")
SOME = whole("[0, 1000000000]")
PAIRS = whole("[2, 1000000000]")  # of pictures, of which one is compared with others
STEPS = whole("[1, 1000000]")  # of a sampler
BATCH = whole("[1, 1000000]")
SIDE = whole("[1, 16384]")  # pixels
WIDTH = whole("[1, 65536]")  # features
FEW = whole("[1, 1024]")  # layers, heads, patches
FRAMES = whole("[1, 10000]")
WORKERS = whole("[0, 1000]")
SEED = whole("[0, 9223372036854775807]")
SHARE = Numbers("[0, 1]")
PART = Numbers("[0, 1)")
AMOUNT = Numbers("[0, 1000000]")
SIZE = Numbers("(0, 1000000]")
LEVEL = Numbers("[-1000, 1000]")  # 0 is in their midst
INSISTENCE = Numbers("[-1000000, 1000000]")  # guidance: 1 is none or Bayes' rule, below 0 is away
LENGTH = Numbers(
    f"(0, {12**-0.5}]"
)  # of an average, as a share of the run: at most all steps alike
MANY = range(1, 65)
AT_LEAST = Numbers("[0, inf)")  # however large: a bound that is never met
ABOVE = Numbers("(0, inf)")

RANGES: dict[str, Numbers | Listed | Exactly | Rule] = {
    # The commands' own, and train.py's.
    "seed": SEED,
    "train seed": whole("[0, 4294967295]"),  # numpy's
    "n": COUNT,
    "steps": STEPS,
    "batch": BATCH,
    "size": SIDE,
    "sample size": (SIDE, Listed(SIDE, [2])),
    "prepare size": (SIDE, NULL),
    "pad": Listed(whole("[0, 16384]"), [4]),
    "previews": whole("[0, 1000]"),
    "frames": FRAMES,
    "fps": Numbers("(0, 1000]"),
    "strength": Numbers("(0, 1]"),
    "enlarging": INSISTENCE,
    "min_score": Numbers("(0, 100]"),
    "augment keep": Numbers("(0, 1]"),
    "samples_per_shard": whole("[1, 10000]"),  # four digits of a key
    "count": PAIRS,
    "real": PAIRS,
    "length": LENGTH,
    "top": COUNT,
    "most": COUNT,
    "package scenes": PAIRS,
    "quality": whole("[1, 100]"),
    "workers": whole("[1, 1000]"),
    "limit": COUNT,
    "ema_decay": PART,
    "phema.lengths": Listed(LENGTH, range(65)),
    "phema.every": COUNT,
    "time_power": SIZE,
    "caption_dropout": SHARE,
    "kl_weight": AMOUNT,
    "vocab_size": whole("[514, 1000000]"),  # 256 bytes, twice, begin and end
    "samples.n": whole("[0, 1000]"),
    "samples.steps": STEPS,
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.keep_best": SOME,
    "stop_after_skips": COUNT,
    # Groups.
    "autoencoder.patch": FEW,
    "autoencoder.latent_channels": FEW,
    "autoencoder.channels": WIDTH,
    "autoencoder.multipliers": Listed(FEW, MANY),
    "autoencoder.blocks": FEW,
    "autoencoder.groups": whole("[0, 65536]"),  # 0: no norm
    "classifier.width": WIDTH,
    "classifier.channels": WIDTH,
    "classifier.multipliers": Listed(FEW, MANY),
    "classifier.blocks": FEW,
    "classifier.heads": FEW,
    "classifier.depth": FEW,
    "classifier.groups": WIDTH,
    "classifier.embedding": WIDTH,
    "classifier.waves": whole("[0, 1024]"),
    "classifier.dropout": SHARE,
    "clip.patch_size": SIDE,
    "clip.width": WIDTH,
    "clip.layers": FEW,
    "clip.heads": FEW,
    "clip.projection": WIDTH,
    "clip.max_length": WIDTH,
    "clip.max_scale": SIZE,
    "data.count": COUNT,
    "data.val_count": COUNT,
    "data.size": SIDE,
    "data.batch_size": BATCH,
    "data.flip": SHARE,
    "data.window": COUNT,
    "data.group": COUNT,
    "data.family": COUNT,
    "data.frames": FRAMES,
    "data.workers": WORKERS,
    "data.val_batch_size": BATCH,
    "data.val_limit": COUNT,
    "data.max_skipped": SHARE,
    "data.min_size": SIDE,
    "data.cache_gb": ABOVE,
    "early_stop.others": COUNT,
    "early_stop.begin": SOME,
    "early_stop.validations": COUNT,
    "early_stop.least": AT_LEAST,
    "eval.count": PAIRS,
    "eval.steps": STEPS,
    "eval.images.every": SOME,
    "eval.scenes.every": COUNT,
    "eval.real": PAIRS,
    "eval.batch": BATCH,
    "guidance.scale": INSISTENCE,
    "guidance.style_scale": INSISTENCE,
    "guidance.interval": Listed(SHARE, [2], rising=True),
    "guidance.rescale": SHARE,
    "guidance.parallel": INSISTENCE,
    "guidance.momentum": Numbers("(-1, 1)"),
    "guidance.bound": ABOVE,
    "hydra.n_jobs": whole("[1, 10000]"),
    "hydra.devices": (whole("[0, 10000]"), NULL),
    "hydra.timeout_min": COUNT,
    "hydra.signal_delay_s": SOME,
    "hydra.array_parallelism": COUNT,
    "hydra.n_trials": COUNT,
    "hydra.max_failure_rate": SHARE,
    "hydra.seed": (SEED, NULL),
    "hydra.n_startup_trials": SOME,
    "loss.c": SIZE,
    "model.channels": WIDTH,
    "model.multipliers": Listed(FEW, MANY),
    "model.blocks": FEW,
    "model.heads": FEW,
    "model.depth": FEW,
    "model.groups": WIDTH,
    "model.dropout": SHARE,
    "model.embedding": WIDTH,
    "model.waves": whole("[0, 1024]"),
    "objective.offset_noise": AMOUNT,
    "objective.input_perturbation": AMOUNT,
    "optimizer.lr": Numbers("[0, 1000000]"),
    "optimizer.betas": Listed(PART, [2]),
    "optimizer.weight_decay": AMOUNT,
    "optimizer.warmup": SOME,
    "sampler.eta": SHARE,
    "sampler.order": whole("[1, 3]"),
    "sampler.clip": ABOVE,
    "sampler.quantile": Numbers("(0, 1]"),
    "sampler.churn": AMOUNT,
    "sampler.churn_min": AT_LEAST,
    "sampler.churn_max": AT_LEAST,
    "sampler.churn_noise": AMOUNT,
    "sampler.origin": (STEPS, NULL),
    "scheduler.steps": STEPS,
    "scheduler.offset": Numbers("[0, 1000]"),
    "scheduler.max_beta": Numbers("(0, 1)"),
    "scheduler.start": LEVEL,
    "scheduler.end": LEVEL,
    "scheduler.shift": SIZE,
    "scheduler.location": LEVEL,
    "scheduler.scale": SIZE,
    "scheduler.tau": SIZE,
    "strategy.minutes": SIZE,
    "style_encoder.layer": SOME,
    "style_encoder.tiles": FEW,
    "style_encoder.code": whole("[2, 65536]"),
    "style_encoder.dropout": SHARE,
    "style_encoder.silence": SHARE,
    "task.rounds": whole("[1, 1000]"),
    "task.scales": Listed(whole("[2, 64]"), MANY),
    "task.scale": whole("[2, 64]"),
    "task.most": PART,
    "task.level": PART,
    "task.overlap": PART,
    "task.residual": SIZE,
    "task.given": SHARE,
    "task.shared_noise": SHARE,
    "text_encoder.max_length": WIDTH,
    "time_sampler.power": SIZE,
    "time_sampler.mean": LEVEL,
    "time_sampler.std": SIZE,
    "trainer.devices": (
        *(whole("[1, 10000]"), Exactly("auto"), Exactly(-1)),
        Listed(whole("[0, 9999]"), range(1, 10001)),
    ),
    "trainer.num_nodes": whole("[1, 100000]"),
    "trainer.max_steps": COUNT,
    "trainer.accumulate_grad_batches": BATCH,
    "trainer.gradient_clip_val": (AT_LEAST, NULL),
    "trainer.val_check_interval": COUNT,
    "trainer.limit_val_batches": (whole("[1, 1000000000]"), Numbers("(0, 1]")),
    "trainer.log_every_n_steps": COUNT,
    "trainer.max_hours": ABOVE,
    "weighting.sigma_data": SIZE,
    "weighting.gamma": AMOUNT,
    "weighting.k": SIZE,
}


def rule(key: str, command: str) -> Rule | None:
    """What a setting of a command may be; None where it is not in the table, as texts are not."""
    parts = key.split(".")
    names = (f"{command} {key}", key, f"{parts[0]}.{parts[-1]}" if len(parts) > 1 else key)
    found = next((RANGES[name] for name in names if name in RANGES), None)
    return found if found is None or isinstance(found, tuple) else (found,)


def flaw(key: str, value: object, command: str, *, default: object = ..., ours: bool = True) -> str:
    """What is wrong with the value of a setting, in one line with its name; "" where nothing is.

    default: `...` where there is none. ours: whether what the setting belongs to is in the table.
    """
    allowed = rule(key, command) if ours else None
    if allowed is None and isinstance(default, bool):
        allowed = (Exactly(True), Exactly(False))
    if allowed is not None:
        allowed = (*allowed, NULL) if default is None and NULL not in allowed else allowed
        good = any(each.accepts(value) for each in allowed)
    else:
        good = all(math.isfinite(number) for number in _numbers(value))
        if isinstance(default, int | float) and isinstance(value, str | list | dict):
            return f"{key}={spoken(value)} must be a number (its default is {spoken(default)})"
    may_be = "a finite number" if allowed is None else ", or ".join(map(str, allowed))
    return "" if good else f"{key}={spoken(value)} must be {may_be}"


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
