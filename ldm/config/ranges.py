"""Which numbers each setting takes: one table, looked up before anything is imported or written.

A key of `conf/` is found by its whole name, else by its first and last part (`guidance.inner.scale`
is `guidance.scale`). A key that is a command's own may be told apart with the command's name
(`augment keep`). Null is taken where the default is null or the table has NULL. A setting of a
class from elsewhere is not in the table: it must be finite, and nothing else is known of it.
"""

import math
from collections.abc import Iterator

from ldm.config.rules import ExactRule, ListRule, NumberRule, format_setting_value

# What a `_target_` begins with whose settings are known.
OWN_TARGET_PREFIXES = ("ldm.", "lightning.", "datetime.", "hydra_plugins.")

SettingRule = tuple[NumberRule | ListRule | ExactRule, ...]  # one of which is enough


def integer_rule(interval: str) -> NumberRule:
    """The integers of an interval."""
    return NumberRule(interval, whole=True)


NULL_RULE = ExactRule(None)
POSITIVE_INTEGER = integer_rule("[1, 1000000000]")
NONNEGATIVE_INTEGER = integer_rule("[0, 1000000000]")
INTEGER_FROM_TWO = integer_rule(
    "[2, 1000000000]"
)  # of pictures, of which one is compared with others
SAMPLER_STEPS_RANGE = integer_rule("[1, 1000000]")  # of a sampler
BATCH_SIZE_RANGE = integer_rule("[1, 1000000]")
IMAGE_SIDE_RANGE = integer_rule("[1, 16384]")  # pixels
NETWORK_WIDTH_RANGE = integer_rule("[1, 65536]")  # features
SMALL_COUNT_RANGE = integer_rule("[1, 1024]")  # layers, heads, patches
FRAME_COUNT_RANGE = integer_rule("[1, 10000]")
WORKER_COUNT_RANGE = integer_rule("[0, 1000]")
SEED_RANGE = integer_rule("[0, 9223372036854775807]")
UNIT_INTERVAL = NumberRule("[0, 1]")
FRACTION_BELOW_ONE = NumberRule("[0, 1)")
NONNEGATIVE_AMOUNT = NumberRule("[0, 1000000]")
POSITIVE_AMOUNT = NumberRule("(0, 1000000]")
SIGNED_AMOUNT = NumberRule("[-1000, 1000]")  # 0 is in their midst
GUIDANCE_SCALE_RANGE = NumberRule(
    "[-1000000, 1000000]"
)  # guidance: 1 is none or Bayes' rule, below 0 is away
EMA_LENGTH_RANGE = NumberRule(
    f"(0, {12**-0.5}]"
)  # of an average, as a share of the run: at most all steps alike
LIST_LENGTHS = range(1, 65)
NONNEGATIVE_BOUND = NumberRule("[0, inf)")  # however large: a bound that is never met
POSITIVE_BOUND = NumberRule("(0, inf)")

SETTING_RANGES: dict[str, NumberRule | ListRule | ExactRule | SettingRule] = {
    # The commands' own, and train.py's.
    "seed": SEED_RANGE,
    "train seed": integer_rule("[0, 4294967295]"),  # numpy's
    "n": POSITIVE_INTEGER,
    "steps": SAMPLER_STEPS_RANGE,
    "batch": BATCH_SIZE_RANGE,
    "size": IMAGE_SIDE_RANGE,
    "sample size": (IMAGE_SIDE_RANGE, ListRule(IMAGE_SIDE_RANGE, [2])),
    "prepare size": (IMAGE_SIDE_RANGE, NULL_RULE),
    "pad": ListRule(integer_rule("[0, 16384]"), [4]),
    "previews": integer_rule("[0, 1000]"),
    "frames": FRAME_COUNT_RANGE,
    "fps": NumberRule("(0, 1000]"),
    "strength": NumberRule("(0, 1]"),
    "cascade_guidance_scale": GUIDANCE_SCALE_RANGE,
    "min_score": NumberRule("(0, 100]"),
    "augment keep": NumberRule("(0, 1]"),
    "samples_per_shard": integer_rule("[1, 10000]"),  # four digits of a key
    "count": INTEGER_FROM_TWO,
    "real": INTEGER_FROM_TWO,
    "length": EMA_LENGTH_RANGE,
    "top": POSITIVE_INTEGER,
    "most": POSITIVE_INTEGER,
    "package scenes": INTEGER_FROM_TWO,
    "quality": integer_rule("[1, 100]"),
    "workers": integer_rule("[1, 1000]"),
    "limit": POSITIVE_INTEGER,
    "ema_decay": FRACTION_BELOW_ONE,
    "phema.lengths": ListRule(EMA_LENGTH_RANGE, range(65)),
    "phema.every": POSITIVE_INTEGER,
    "time_power": POSITIVE_AMOUNT,
    "caption_dropout": UNIT_INTERVAL,
    "kl_weight": NONNEGATIVE_AMOUNT,
    "vocab_size": integer_rule("[514, 1000000]"),  # 256 bytes, twice, begin and end
    "samples.n": integer_rule("[0, 1000]"),
    "samples.steps": SAMPLER_STEPS_RANGE,
    "checkpoint.every": POSITIVE_INTEGER,
    "checkpoint.keep": POSITIVE_INTEGER,
    "checkpoint.keep_best": NONNEGATIVE_INTEGER,
    "stop_after_skips": POSITIVE_INTEGER,
    # Groups.
    "autoencoder.patch": SMALL_COUNT_RANGE,
    "autoencoder.latent_channels": SMALL_COUNT_RANGE,
    "autoencoder.channels": NETWORK_WIDTH_RANGE,
    "autoencoder.multipliers": ListRule(SMALL_COUNT_RANGE, LIST_LENGTHS),
    "autoencoder.blocks": SMALL_COUNT_RANGE,
    "autoencoder.groups": integer_rule("[0, 65536]"),  # 0: no norm
    "classifier.width": NETWORK_WIDTH_RANGE,
    "classifier.channels": NETWORK_WIDTH_RANGE,
    "classifier.multipliers": ListRule(SMALL_COUNT_RANGE, LIST_LENGTHS),
    "classifier.blocks": SMALL_COUNT_RANGE,
    "classifier.heads": SMALL_COUNT_RANGE,
    "classifier.depth": SMALL_COUNT_RANGE,
    "classifier.groups": NETWORK_WIDTH_RANGE,
    "classifier.embedding": NETWORK_WIDTH_RANGE,
    "classifier.positional_waves": integer_rule("[0, 1024]"),
    "classifier.dropout": UNIT_INTERVAL,
    "clip.patch_size": IMAGE_SIDE_RANGE,
    "clip.width": NETWORK_WIDTH_RANGE,
    "clip.layers": SMALL_COUNT_RANGE,
    "clip.heads": SMALL_COUNT_RANGE,
    "clip.projection": NETWORK_WIDTH_RANGE,
    "clip.max_length": NETWORK_WIDTH_RANGE,
    "clip.max_scale": POSITIVE_AMOUNT,
    "data.count": POSITIVE_INTEGER,
    "data.val_count": POSITIVE_INTEGER,
    "data.size": IMAGE_SIDE_RANGE,
    "data.batch_size": BATCH_SIZE_RANGE,
    "data.flip": UNIT_INTERVAL,
    "data.window": POSITIVE_INTEGER,
    "data.group": POSITIVE_INTEGER,
    "data.family": POSITIVE_INTEGER,
    "data.frames": FRAME_COUNT_RANGE,
    "data.workers": WORKER_COUNT_RANGE,
    "data.val_batch_size": BATCH_SIZE_RANGE,
    "data.val_limit": POSITIVE_INTEGER,
    "data.max_skipped": UNIT_INTERVAL,
    "data.min_size": IMAGE_SIDE_RANGE,
    "data.cache_gb": POSITIVE_BOUND,
    "early_stop.others": POSITIVE_INTEGER,
    "early_stop.min_steps": NONNEGATIVE_INTEGER,
    "early_stop.validations": POSITIVE_INTEGER,
    "early_stop.min_delta": NONNEGATIVE_BOUND,
    "eval.count": INTEGER_FROM_TWO,
    "eval.steps": SAMPLER_STEPS_RANGE,
    "eval.images.every": NONNEGATIVE_INTEGER,
    "eval.scenes.every": POSITIVE_INTEGER,
    "eval.real": INTEGER_FROM_TWO,
    "eval.batch": BATCH_SIZE_RANGE,
    "guidance.scale": GUIDANCE_SCALE_RANGE,
    "guidance.style_scale": GUIDANCE_SCALE_RANGE,
    "guidance.interval": ListRule(UNIT_INTERVAL, [2], rising=True),
    "guidance.rescale": UNIT_INTERVAL,
    "guidance.parallel": GUIDANCE_SCALE_RANGE,
    "guidance.momentum": NumberRule("(-1, 1)"),
    "guidance.bound": POSITIVE_BOUND,
    "hydra.n_jobs": integer_rule("[1, 10000]"),
    "hydra.devices": (integer_rule("[0, 10000]"), NULL_RULE),
    "hydra.timeout_min": POSITIVE_INTEGER,
    "hydra.signal_delay_s": NONNEGATIVE_INTEGER,
    "hydra.array_parallelism": POSITIVE_INTEGER,
    "hydra.n_trials": POSITIVE_INTEGER,
    "hydra.max_failure_rate": UNIT_INTERVAL,
    "hydra.seed": (SEED_RANGE, NULL_RULE),
    "hydra.n_startup_trials": NONNEGATIVE_INTEGER,
    "loss.c": POSITIVE_AMOUNT,
    "model.channels": NETWORK_WIDTH_RANGE,
    "model.multipliers": ListRule(SMALL_COUNT_RANGE, LIST_LENGTHS),
    "model.blocks": SMALL_COUNT_RANGE,
    "model.heads": SMALL_COUNT_RANGE,
    "model.depth": SMALL_COUNT_RANGE,
    "model.groups": NETWORK_WIDTH_RANGE,
    "model.dropout": UNIT_INTERVAL,
    "model.embedding": NETWORK_WIDTH_RANGE,
    "model.positional_waves": integer_rule("[0, 1024]"),
    "objective.offset_noise": NONNEGATIVE_AMOUNT,
    "objective.input_perturbation": NONNEGATIVE_AMOUNT,
    "optimizer.lr": NumberRule("[0, 1000000]"),
    "optimizer.betas": ListRule(FRACTION_BELOW_ONE, [2]),
    "optimizer.weight_decay": NONNEGATIVE_AMOUNT,
    "optimizer.warmup": NONNEGATIVE_INTEGER,
    "sampler.eta": UNIT_INTERVAL,
    "sampler.order": integer_rule("[1, 3]"),
    "sampler.clip": POSITIVE_BOUND,
    "sampler.quantile": NumberRule("(0, 1]"),
    "sampler.churn": NONNEGATIVE_AMOUNT,
    "sampler.churn_min": NONNEGATIVE_BOUND,
    "sampler.churn_max": NONNEGATIVE_BOUND,
    "sampler.churn_noise": NONNEGATIVE_AMOUNT,
    "sampler.original_steps": (SAMPLER_STEPS_RANGE, NULL_RULE),
    "scheduler.steps": SAMPLER_STEPS_RANGE,
    "scheduler.offset": NumberRule("[0, 1000]"),
    "scheduler.max_beta": NumberRule("(0, 1)"),
    "scheduler.start": SIGNED_AMOUNT,
    "scheduler.end": SIGNED_AMOUNT,
    "scheduler.shift": POSITIVE_AMOUNT,
    "scheduler.location": SIGNED_AMOUNT,
    "scheduler.scale": POSITIVE_AMOUNT,
    "scheduler.tau": POSITIVE_AMOUNT,
    "strategy.minutes": POSITIVE_AMOUNT,
    "style_encoder.layer": NONNEGATIVE_INTEGER,
    "style_encoder.tiles": SMALL_COUNT_RANGE,
    "style_encoder.code": integer_rule("[2, 65536]"),
    "style_encoder.dropout": UNIT_INTERVAL,
    "style_encoder.word_dropout": UNIT_INTERVAL,
    "task.rounds": integer_rule("[1, 1000]"),
    "task.scales": ListRule(integer_rule("[2, 64]"), LIST_LENGTHS),
    "task.scale": integer_rule("[2, 64]"),
    "task.max_noise_level": FRACTION_BELOW_ONE,
    "task.noise_level": FRACTION_BELOW_ONE,
    "task.tile_overlap": FRACTION_BELOW_ONE,
    "task.residual_std": POSITIVE_AMOUNT,
    "task.first_frame_prob": UNIT_INTERVAL,
    "task.shared_noise": UNIT_INTERVAL,
    "text_encoder.max_length": NETWORK_WIDTH_RANGE,
    "timestep_sampler.power": POSITIVE_AMOUNT,
    "timestep_sampler.mean": SIGNED_AMOUNT,
    "timestep_sampler.std": POSITIVE_AMOUNT,
    "trainer.devices": (
        *(integer_rule("[1, 10000]"), ExactRule("auto"), ExactRule(-1)),
        ListRule(integer_rule("[0, 9999]"), range(1, 10001)),
    ),
    "trainer.num_nodes": integer_rule("[1, 100000]"),
    "trainer.max_steps": POSITIVE_INTEGER,
    "trainer.accumulate_grad_batches": BATCH_SIZE_RANGE,
    "trainer.gradient_clip_val": (NONNEGATIVE_BOUND, NULL_RULE),
    "trainer.val_check_interval": POSITIVE_INTEGER,
    "trainer.limit_val_batches": (integer_rule("[1, 1000000000]"), NumberRule("(0, 1]")),
    "trainer.log_every_n_steps": POSITIVE_INTEGER,
    "trainer.max_hours": POSITIVE_BOUND,
    "weighting.sigma_data": POSITIVE_AMOUNT,
    "weighting.gamma": NONNEGATIVE_AMOUNT,
    "weighting.k": POSITIVE_AMOUNT,
}


def find_setting_rule(key: str, command: str) -> SettingRule | None:
    """What a setting of a command may be; None where it is not in the table, as texts are not."""
    parts = key.split(".")
    names = (f"{command} {key}", key, f"{parts[0]}.{parts[-1]}" if len(parts) > 1 else key)
    found = next((SETTING_RANGES[name] for name in names if name in SETTING_RANGES), None)
    return found if found is None or isinstance(found, tuple) else (found,)


def format_invalid_value(
    key: str, value: object, command: str, *, default: object = ..., ours: bool = True
) -> str:
    """What is wrong with the value of a setting, in one line with its name; "" where nothing is.

    default: `...` where there is none. ours: whether what the setting belongs to is in the table.
    """
    allowed = find_setting_rule(key, command) if ours else None
    if allowed is None and isinstance(default, bool):
        allowed = (ExactRule(True), ExactRule(False))
    if allowed is not None:
        allowed = (*allowed, NULL_RULE) if default is None and NULL_RULE not in allowed else allowed
        good = any(each.accepts(value) for each in allowed)
    else:
        good = all(math.isfinite(number) for number in _numbers(value))
        if isinstance(default, int | float) and isinstance(value, str | list | dict):
            return (
                f"{key}={format_setting_value(value)} must be a number (its default is "
                f"{format_setting_value(default)})"
            )
    may_be = "a finite number" if allowed is None else ", or ".join(map(str, allowed))
    return "" if good else f"{key}={format_setting_value(value)} must be {may_be}"


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
