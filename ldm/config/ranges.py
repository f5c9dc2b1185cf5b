"""The numbers and words that each setting takes: one table, read before anything is imported.

A key is found by its whole name, else by its first and last part (`guidance.inner.scale` is
`guidance.scale`); `augment keep` is for one command. Null is allowed where the default is null.
"""

import math
from collections.abc import Iterator

from ldm.config.value_rules import (
    SIDE,
    ChoiceRule,
    ExactRule,
    ListRule,
    NumberRule,
    format_setting_value,
    integers,
)
from ldm.utils.errors import UsageError

# Targets that begin like this have their settings in the table.
OWN_TARGET_PREFIXES = ("ldm.", "lightning.", "datetime.", "hydra_plugins.")

ValueRule = NumberRule | ListRule | ExactRule | ChoiceRule
SettingRule = tuple[ValueRule, ...]  # a value needs to fit one of them


NULL = ExactRule(None)
POSITIVE = integers("[1, 1000000000]")
STEPS = integers("[1, 1000000]")
SEED = integers("[0, 9223372036854775807]")
BLOCKS = integers("[1, 1024]")  # of a network: blocks, layers, heads, patches
SHARE = NumberRule("[0, 1]")
SHARE_BELOW_ONE = NumberRule("[0, 1)")
AMOUNT = NumberRule("[0, inf)")  # however large: a bound that is never reached
# The width of an EMA, as a share of the run; at most all steps alike.
EMA_LENGTH_RANGE = NumberRule(f"(0, {12**-0.5}]")

PRECISIONS = (  # Lightning's, and ours
    "auto",
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    *("32", "bf16", "16", "64", "transformer-engine", "transformer-engine-float16"),
)
SAMPLING_DTYPES = ("float32", "bfloat16", "float16")

# A rule, or several of which one is enough, and the settings that it is for.
RULES: tuple[tuple[ValueRule | SettingRule, str], ...] = (
    # Words.
    (ChoiceRule(("diffusion", "autoencoder", "clip", "classifier")), "stage"),
    ((ExactRule("auto"), ExactRule(True), ExactRule(False)), "checkpoint.background"),
    ((ExactRule(True), ExactRule(False), ChoiceRule(("json",))), "plan"),
    # Without quotes, YAML reads off as false.
    ((ChoiceRule(("off", "default", "reduce-overhead")), ExactRule(False)), "compile"),
    (ChoiceRule(("philox", "torch")), "rng"),
    (ChoiceRule(("auto", "cpu", "gpu", "cuda", "mps", "tpu")), "trainer.accelerator"),
    ((ChoiceRule(PRECISIONS), NULL), "trainer.precision"),
    ((ChoiceRule(SAMPLING_DTYPES), NULL), "dtype"),
    (ChoiceRule(("trailing", "leading", "linspace", "karras", "logsnr", "ays")), "sampler.spacing"),
    ((ChoiceRule(("ddim", "euler", "dpm")), NULL), "sampler.grid"),
    (ChoiceRule(("trailing", "leading", "linspace")), "sampler.ends"),
    (ChoiceRule(("eps", "v")), "sampler.average"),
    (ChoiceRule(("flow", "edm", "x0")), "sampler.slope"),
    (ChoiceRule(("max", "nearest")), "task.mask_resize"),
    ((ChoiceRule(("ldm", "diffusers")), NULL), "backend"),
    (ChoiceRule(("independent", "stratified", "sobol")), "timestep_sampler.spread"),
    (ChoiceRule(("constant", "exponential", "snr")), "loss.schedule"),
    (ChoiceRule(("constant", "cosine")), "optimizer.decay"),
    (ChoiceRule(("eps", "x0", "v", "flow")), "objective.kind"),
    (ChoiceRule(("center", "random")), "data.crop"),
    (ChoiceRule(("stop", "skip")), "on_error, data.on_error"),
    (ChoiceRule(("sample", "mean")), "posterior"),
    (ChoiceRule(("jpg", "png", "webp")), "format"),
    (ChoiceRule(("all", "train", "val", "unseen")), "prepare part"),
    (ChoiceRule(("copy", "reference")), "bundle frozen"),
    (ChoiceRule(SAMPLING_DTYPES), "export dtype"),
    (ChoiceRule(("bf16", "bfloat16", "float16", "float32")), "cache dtype"),
    (ChoiceRule(("float32", "bfloat16")), "cache precision"),
    (ChoiceRule(("moments", "mean")), "cache posterior"),
    # Counts.
    (POSITIVE, "n, top, most, limit, max_captions, phema.every, checkpoint.every, checkpoint.keep"),
    (POSITIVE, "data.count, data.val_count, data.window, data.group, data.family, data.val_limit"),
    (POSITIVE, "early_stop.others, early_stop.validations, stop_after_skips, eval.scenes.every"),
    (POSITIVE, "trainer.max_steps, trainer.val_check_interval, trainer.log_every_n_steps"),
    (POSITIVE, "scheduler.base, hydra.timeout_min, hydra.array_parallelism, hydra.n_trials"),
    (integers("[0, 1000000000]"), "checkpoint.keep_best, early_stop.min_steps, eval.images.every"),
    (integers("[0, 1000000000]"), "optimizer.warmup, style_encoder.layer, hydra.signal_delay_s"),
    (integers("[0, 1000000000]"), "hydra.n_startup_trials"),
    (integers("[2, 1000000000]"), "count, real, package scenes, eval.count, eval.real"),
    (STEPS, "steps, samples.steps, eval.steps, scheduler.steps, trainer.accumulate_grad_batches"),
    (STEPS, "batch, eval.batch, data.batch_size, data.val_batch_size"),
    ((STEPS, NULL), "sampler.original_steps"),
    (integers("[1, 10000]"), "frames, data.frames, samples_per_shard, hydra.n_jobs"),
    (integers("[0, 1000]"), "previews, samples.n, data.workers, cache workers, sampler.offset"),
    (integers("[1, 1000]"), "workers, task.rounds"),
    (integers("[1, 100]"), "quality"),
    (integers("[1, 3]"), "sampler.order"),
    (integers("[514, 1000000]"), "vocab_size"),  # 256 bytes, twice, begin and end
    (integers("[1, 100000]"), "trainer.num_nodes"),
    ((POSITIVE, NumberRule("(0, 1]")), "trainer.limit_val_batches"),
    ((integers("[0, 10000]"), NULL), "hydra.devices"),
    (
        (
            *(integers("[1, 10000]"), ExactRule("auto"), ExactRule(-1)),
            ListRule(integers("[0, 9999]"), range(1, 10001)),
        ),
        "trainer.devices",
    ),
    (SEED, "seed"),
    (integers("[0, 4294967295]"), "train seed"),  # numpy's
    ((SEED, NULL), "hydra.seed"),
    (integers("[1, 65536]"), "lora.rank"),
    (NumberRule("(0, 1000000]"), "lora.alpha"),
    # Sizes of images and networks.
    (SIDE, "size, grid, data.size, min_size, data.min_size, clip.patch_size, model.size_factor"),
    ((SIDE, ListRule(SIDE, [2])), "sample size, evaluate size"),
    (
        (ExactRule("auto"), ListRule(ListRule(SIDE, [2]), range(1, 1025)), NULL),
        "buckets, data.buckets",
    ),
    ((SIDE, NULL), "prepare size"),
    ((integers("[64, 16384]"), NULL), "decode_tile"),
    (ListRule(integers("[0, 16384]"), [4]), "pad"),
    (BLOCKS, "autoencoder.patch, autoencoder.latent_channels, autoencoder.blocks, clip.layers"),
    (BLOCKS, "clip.heads, model.blocks, style_encoder.tiles, classifier.blocks"),
    (BLOCKS, "classifier.heads, classifier.depth"),
    ((BLOCKS, ListRule(BLOCKS, range(1, 65))), "model.heads, model.depth"),
    (integers("[0, 65536]"), "model.size_embedding"),  # 0: none
    (
        ListRule(BLOCKS, range(1, 65)),
        "autoencoder.multipliers, classifier.multipliers, model.multipliers",
    ),
    (integers("[1, 65536]"), "autoencoder.channels, classifier.width, classifier.channels"),
    (integers("[1, 65536]"), "classifier.groups, classifier.embedding, clip.width"),
    (integers("[1, 65536]"), "clip.max_length, model.channels, model.groups, model.embedding"),
    (integers("[4, 65536]"), "model.width"),
    (integers("[1, 64]"), "model.patch"),
    (integers("[1, 65536]"), "text_encoder.max_length, clip.projection"),
    (integers("[-1024, -1]"), "text_encoder.layer"),  # counted from the last
    (integers("[0, 65536]"), "autoencoder.groups"),  # 0: no norm
    (integers("[2, 65536]"), "style_encoder.code"),
    (integers("[0, 1024]"), "classifier.positional_waves, model.positional_waves"),
    (integers("[2, 64]"), "task.scale"),
    (ListRule(integers("[2, 64]"), range(1, 65)), "task.scales"),
    # Shares.
    (SHARE, "caption_dropout, classifier.dropout, model.dropout, data.flip, data.max_skipped"),
    (SHARE, "style_encoder.dropout, style_encoder.word_dropout, guidance.rescale, sampler.eta"),
    (SHARE, "task.first_frame_prob, task.shared_noise, hydra.max_failure_rate"),
    (SHARE_BELOW_ONE, "optimizer.momentum"),
    (SHARE_BELOW_ONE, "ema_decay, task.max_noise_level, task.noise_level, task.tile_overlap"),
    (NumberRule("(0, 1]"), "strength, augment keep, sampler.quantile"),
    (NumberRule("(0, 1)"), "scheduler.max_beta"),
    (ListRule(SHARE, [2], rising=True), "guidance.interval"),
    (ListRule(SHARE_BELOW_ONE, [2]), "optimizer.betas"),
    (EMA_LENGTH_RANGE, "length"),
    (ListRule(EMA_LENGTH_RANGE, range(65)), "phema.lengths"),
    # Other numbers.
    (NumberRule("(0, 1000000]"), "time_power, timestep_sampler.power, timestep_sampler.std"),
    (NumberRule("(0, 1000000]"), "scheduler.scale, scheduler.tau, loss.c"),
    ((NumberRule("(0, 1000000]"), ExactRule("auto")), "scheduler.shift"),
    (NumberRule("(0, 1000000]"), "weighting.sigma_data, weighting.k, task.residual_std"),
    (NumberRule("(0, 1000000]"), "clip.max_scale, strategy.minutes, trainer.peak_tflops"),
    (NumberRule("[0, 1000000]"), "kl_weight, objective.offset_noise, objective.input_perturbation"),
    (NumberRule("[0, 1000000]"), "optimizer.lr, optimizer.weight_decay, weighting.gamma"),
    ((NumberRule("[0, 1000000]"), NULL), "optimizer.adamw_lr"),
    (NumberRule("[0, 1000000]"), "sampler.churn, sampler.churn_noise"),
    (AMOUNT, "early_stop.min_delta, sampler.churn_min, sampler.churn_max"),
    ((AMOUNT, NULL), "trainer.gradient_clip_val"),
    ((NumberRule("(0, 1000000]"), NULL), "sampler.timestep_scaling"),
    (
        NumberRule("(0, inf)"),
        "cache_gb, data.cache_gb, guidance.bound, sampler.clip, trainer.max_hours",
    ),
    (NumberRule("[-1000, 1000]"), "scheduler.start, scheduler.end, scheduler.location"),
    (NumberRule("[-1000, 1000]"), "timestep_sampler.mean"),
    (NumberRule("[0, 1000]"), "scheduler.offset"),
    (NumberRule("[-1000000, 1000000]"), "model.position_offset"),
    (NumberRule("(0, 1000]"), "model.position_scale"),
    (NumberRule("(0, 1000]"), "fps"),
    (NumberRule("(0, 100]"), "min_score"),
    (NumberRule("[-1, 1]"), "prepare threshold"),
    # Guidance: 1 is none or Bayes' rule, below 0 is away from the prompt.
    (NumberRule("[-1000000, 1000000]"), "guidance.scale, guidance.style_scale"),
    (NumberRule("[-1000000, 1000000]"), "guidance.parallel, cascade_guidance_scale"),
    (NumberRule("(-1, 1)"), "guidance.momentum"),
)
FILTER_SETTINGS = ("data.where", "data.val_where")  # conditions, see ldm/data/where.py
SETTING_RANGES = {name: rule for rule, names in RULES for name in names.split(", ")}


def find_setting_rule(key: str, command: str) -> SettingRule | None:
    """The rule of a command's setting; None where it is not in the table, as texts are not."""
    parts = key.split(".")
    names = (f"{command} {key}", key, f"{parts[0]}.{parts[-1]}" if len(parts) > 1 else key)
    found = next((SETTING_RANGES[name] for name in names if name in SETTING_RANGES), None)
    return found if found is None or isinstance(found, tuple) else (found,)


def format_invalid_value(
    key: str, value: object, command: str, *, default: object = ..., ours: bool = True
) -> str:
    """What is wrong with the value of a setting, in one line with its name; "" if nothing is.

    default: `...` where there is none. ours: whether its target is one of OWN_TARGET_PREFIXES.
    """
    if ours and key in FILTER_SETTINGS and value is not None:
        return _describe_filter_problem(key, value)
    rule = find_setting_rule(key, command) if ours else None
    if rule is None and isinstance(default, bool):
        rule = (ExactRule(True), ExactRule(False))
    if rule is not None:
        rule = (*rule, NULL) if default is None and NULL not in rule else rule
        valid = any(each.accepts(value) for each in rule)
    else:
        valid = all(math.isfinite(number) for number in _numbers(value))
        if isinstance(default, int | float) and isinstance(value, str | list | dict):
            return (
                f"{key}={format_setting_value(value)} must be a number (its default is "
                f"{format_setting_value(default)})"
            )
    may_be = "a finite number" if rule is None else ", or ".join(map(str, rule))
    return "" if valid else f"{key}={format_setting_value(value)} must be {may_be}"


def _describe_filter_problem(key: str, value: object) -> str:
    from ldm.data.where import SampleFilter  # numpy: other settings need not wait for it

    try:
        SampleFilter(value)
    except UsageError as error:
        return f"{key}{str(error).removeprefix('where')}"
    return ""


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
