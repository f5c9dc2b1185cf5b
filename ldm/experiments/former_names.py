"""Names that components and settings had before: runs and checkpoints of then say them.

A component that moves or changes its name gets a line in `FORMER_TARGETS`, a setting one in
`FORMER_SETTINGS`.
"""

import re

FORMER_TARGETS = {
    "ldm.data.scenes.data.scenes_data": "ldm.data.scenes.datamodule.scenes_data",
    "ldm.diffusion.composition.Composed": (
        "ldm.diffusion.guidance.compositional.CompositionalGuidance"
    ),
    "ldm.diffusion.edm.EDM": "ldm.diffusion.samplers.edm.EDMSampler",
    "ldm.diffusion.guidance.Auto": "ldm.diffusion.guidance.cfg.Autoguidance",
    "ldm.diffusion.guidance.ClassifierFree": "ldm.diffusion.guidance.cfg.ClassifierFreeGuidance",
    "ldm.diffusion.guidance.Projected": "ldm.diffusion.guidance.cfg.AdaptiveProjectedGuidance",
    "ldm.diffusion.multistep.DPMSolver": "ldm.diffusion.samplers.multistep.DPMSolverSampler",
    "ldm.diffusion.multistep.UniPC": "ldm.diffusion.samplers.multistep.UniPCSampler",
    "ldm.diffusion.objective.PowerTimes": "ldm.diffusion.timesteps.PowerTimestepSampler",
    "ldm.diffusion.objective.Prediction": "ldm.diffusion.predictions.Prediction",
    "ldm.diffusion.objective.UniformWeighting": "ldm.diffusion.weightings.UniformWeighting",
    "ldm.diffusion.penalty.PseudoHuber": "ldm.diffusion.losses.PseudoHuberLoss",
    "ldm.diffusion.penalty.Squared": "ldm.diffusion.losses.SquaredLoss",
    "ldm.diffusion.samplers.Consistency": "ldm.diffusion.samplers.ddim.ConsistencySampler",
    "ldm.diffusion.samplers.DDIM": "ldm.diffusion.samplers.ddim.DDIMSampler",
    "ldm.diffusion.schedule.Flow": "ldm.diffusion.schedules.FlowSchedule",
    "ldm.diffusion.schedule.Laplace": "ldm.diffusion.schedules.LaplaceSchedule",
    "ldm.diffusion.schedule.cosine": "ldm.diffusion.schedules.cosine",
    "ldm.diffusion.schedule.linear": "ldm.diffusion.schedules.linear",
    "ldm.diffusion.schedule.scaled_linear": "ldm.diffusion.schedules.scaled_linear",
    "ldm.diffusion.schedule.sigmoid": "ldm.diffusion.schedules.sigmoid",
    "ldm.diffusion.schedule.sigmoid_alpha": "ldm.diffusion.schedules.sigmoid_alpha",
    "ldm.diffusion.steering.Classifier": "ldm.diffusion.guidance.gradient.ClassifierGuidance",
    "ldm.diffusion.steering.Judged": "ldm.diffusion.guidance.gradient.ClipGuidance",
    "ldm.diffusion.styling.Styled": "ldm.diffusion.guidance.style.StyleGuidance",
    "ldm.diffusion.times.LogitNormalTimes": "ldm.diffusion.timesteps.LogitNormalTimestepSampler",
    "ldm.diffusion.times.PowerTimes": "ldm.diffusion.timesteps.PowerTimestepSampler",
    "ldm.diffusion.weighting.Debiased": "ldm.diffusion.weightings.DebiasedWeighting",
    "ldm.diffusion.weighting.Edm": "ldm.diffusion.weightings.EDMWeighting",
    "ldm.diffusion.weighting.MinSnr": "ldm.diffusion.weightings.MinSNRWeighting",
    "ldm.diffusion.weighting.P2": "ldm.diffusion.weightings.P2Weighting",
    "ldm.diffusion.weighting.SoftMinSnr": "ldm.diffusion.weightings.SoftMinSNRWeighting",
    "ldm.diffusion.weighting.UniformWeighting": "ldm.diffusion.weightings.UniformWeighting",
    "ldm.metrics.clip_features.ClipFeatures": "ldm.evaluation.features.clip.ClipFeatures",
    "ldm.metrics.dinov2.Dinov2Features": "ldm.evaluation.features.dinov2.Dinov2Features",
    "ldm.metrics.efficientnet.EfficientNetFeatures": (
        "ldm.evaluation.features.efficientnet.EfficientNetFeatures"
    ),
    "ldm.metrics.inception_features.InceptionFeatures": (
        "ldm.evaluation.features.inception.InceptionFeatures"
    ),
    "ldm.models.autoencoder.Identity": "ldm.models.autoencoder.IdentityAutoencoder",
    "ldm.models.classifier.NoisyTower": "ldm.models.noisy_classifier.NoisyTower",
    "ldm.models.labels.Labels": "ldm.models.text.labels.LabelTextEncoder",
    "ldm.models.labels.NoText": "ldm.models.text.labels.NullTextEncoder",
    "ldm.models.style.ClipStyle": "ldm.models.style.ClipStyleEncoder",
    "ldm.models.t5.T5Text": "ldm.models.text.t5.T5TextEncoder",
    "ldm.models.text.ClipText": "ldm.models.text.clip.ClipTextEncoder",
    "ldm.models.weights.autoencoder": "ldm.models.diffusers_format.make_autoencoder_kl",
    "ldm.superres.SuperResolution": "ldm.diffusion.tasks.superres.SuperResolution",
    "ldm.tasks.ImageToImage": "ldm.diffusion.tasks.image_to_image.ImageToImage",
    "ldm.tasks.Inpaint": "ldm.diffusion.tasks.inpainting.Inpainting",
    "ldm.tasks.ProjectedInpaint": "ldm.diffusion.tasks.inpainting.ProjectedInpainting",
    "ldm.tasks.TextToImage": "ldm.diffusion.tasks.text_to_image.TextToImage",
    "ldm.training.early_stop.Median": "ldm.training.callbacks.early_stop.MedianStopping",
    "ldm.training.early_stop.patience": "ldm.training.callbacks.early_stop.patience_stopping",
    "ldm.training.evaluation.ImageCheck": "ldm.training.callbacks.evaluation.ImageQuality",
    "ldm.training.evaluation.SceneCheck": "ldm.training.callbacks.evaluation.SceneAccuracy",
    "ldm.training.fsdp.Sharded": "ldm.training.fsdp.FullyShardedStrategy",
    "ldm.training.optimizer.AdamW": "ldm.training.optimizers.AdamW",
    "ldm.training.wandb_log.wandb_logger": "ldm.training.loggers.wandb.wandb_logger",
    "ldm.video.TextToVideo": "ldm.diffusion.tasks.video.TextToVideo",
}

FORMER_SETTINGS = {
    "time_sampler": "timestep_sampler",
    "objective.time_sampler": "objective.timestep_sampler",
    "model.waves": "model.positional_waves",
    "classifier.waves": "classifier.positional_waves",
    "style_encoder.words": "style_encoder.style_words",
    "style_encoder.silence": "style_encoder.word_dropout",
    "task.most": "task.max_noise_level",
    "task.level": "task.noise_level",
    "task.overlap": "task.tile_overlap",
    "task.residual": "task.residual_std",
    "task.given": "task.first_frame_prob",
    "early_stop.least": "early_stop.min_delta",
    "early_stop.begin": "early_stop.min_steps",
    "sampler.origin": "sampler.original_steps",
    "guidance.judge": "guidance.reward_model",
    "enlarging": "cascade_guidance_scale",
    "logger.project": "logger.wandb.project",
}

# Whole overrides of the command line whose value changed with the name.
FORMER_OVERRIDES = {
    "logger.offline=true": "logger.wandb.mode=offline",
    "logger.offline=false": "logger.wandb.mode=online",
    "logger.offline=null": "logger.wandb.mode=null",
}

FORMER_RNG = "torch"  # of runs that begin before `rng` is a setting


def update_names(config: dict, prefix: str = "") -> dict:
    """Returns the settings of a file with the names of today."""
    updated: dict = {}
    settings = {} if is_own_target(config.get("_target_")) else FORMER_SETTINGS
    for key, value in config.items():
        former = f"{prefix}{key}"
        name = settings.get(former, former)
        leaf = key if name == former else name.rpartition(".")[2]
        if leaf != key and leaf in config:  # a file that says both means that of today
            continue
        if key == "_target_" and isinstance(value, str):
            value = FORMER_TARGETS.get(value, value)
        elif isinstance(value, dict):
            value = update_names(value, f"{name}.")
        updated[leaf] = value
    return updated


def is_own_target(target: object) -> bool:
    """Returns whether a target is a user's own, whose settings never had other names."""
    return isinstance(target, str) and not target.startswith("ldm.")


def get_rng(config: dict) -> object:
    """Returns the `rng` of a run's settings."""
    return config.get("rng", FORMER_RNG)


def former_setting(name: str) -> str:
    """Returns the former name of a setting; `name` itself if it had none."""
    return next((old for old, new in FORMER_SETTINGS.items() if new == name), name)


def update_override(override: str) -> str:
    """Returns a `key=value` of the command line with the key of today."""
    override = FORMER_OVERRIDES.get(override, override)
    key, equals, value = override.partition("=")
    name = re.sub(r"^[+~]*(hydra\.sweeper\.params\.)?", "", key)
    updated = "@".join(map(update_key, name.split("@")))  # group@place, or the group alone
    return f"{key.removesuffix(name)}{updated}{equals}{value}"


def update_key(key: str) -> str:
    """Returns the name of today of a setting, or of one below it."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (name := FORMER_SETTINGS.get(".".join(parts[:end]))) is not None:
            return ".".join([name, *parts[end:]])
    return key
