"""Settings that a run decides itself, and what to give in their place; imports nothing."""

# The setting, and the remedy: a test compares this table with what ldm/config passes.
RESERVED_SETTINGS = {
    "trainer.callbacks": "give callbacks=NAME, or '+callbacks.mine._target_=mypackage.Class'",
    "trainer.logger": "give logger=NAME, or '+logger.mine._target_=mypackage.Class'",
    "trainer.strategy": "give strategy=ddp, strategy=fsdp, or strategy._target_=mypackage.Class",
    "trainer.plugins": "leave it out: the run has a plugin of its own, which writes checkpoints",
    "trainer.default_root_dir": "give name=my-run",
    "trainer.enable_checkpointing": "see checkpoint.every and checkpoint.keep",
    "trainer.enable_model_summary": (
        "give '+callbacks.summary._target_=lightning.pytorch.callbacks.ModelSummary'"
    ),
    "trainer.check_val_every_n_epoch": "give trainer.val_check_interval, in optimizer steps",
    "trainer.num_sanity_val_steps": "see validate_first",
    "trainer.profiler": "give profile=true",
    "trainer.use_distributed_sampler": "leave it out: the data give each rank its share",
    "trainer.inference_mode": "leave it out: the first validation's numbers are used in training",
    "trainer.max_epochs": "give trainer.max_steps",
    "data.seed": "give seed",
    "model.in_channels": "autoencoder and task decide it",
    "model.out_channels": "autoencoder decides it",
    "model.context_dim": "text_encoder decides it",
    "model.pooled_dim": "text_encoder decides it",
    "model.size_factor": "autoencoder decides it",
    "objective.schedule": "give scheduler=NAME",
    "objective.weighting": "give weighting=NAME",
    "objective.loss": "give loss=NAME",
    "objective.timestep_sampler": "give timestep_sampler=NAME",
    "timestep_sampler.batch": "give data.batch_size",
    "clip.tokenizer": "vocab_size decides it",
    "clip.image_size": "give data.size",
    "data.grid": "the networks decide it",
    "classifier.in_channels": "autoencoder decides it",
    "classifier.schedule": "give scheduler=NAME",
    "logger.wandb.run_dir": "give name=my-run",
    "logger.wandb.name": "give name=my-run",
    "logger.wandb.overrides": "leave it out: they are the words of the command line",
    "logger.tensorboard.run_dir": "give name=my-run",
    "logger.mlflow.run_dir": "give name=my-run",
    "logger.mlflow.name": "give name=my-run",
    "logger.mlflow.overrides": "leave it out: they are the words of the command line",
    "eval.scenes.size": "give data.size",
    "eval.images.size": "give data.size",
    "eval.images.images": "give data.val",
    "eval.images.reference_images": "give data.train",
    "eval.images.folder": "give name=my-run",
    "eval.images.raw_denoiser": "see eval.images.raw",
    "eval.images.settings": "leave it out: they are those of the run",
    "eval.images.metrics": "give metrics=NAME",
}
# Groups whose keys name components.
NAMED_COMPONENT_GROUPS = ("callbacks", "metrics", "eval", "features", "logger")
OUR_EVALUATIONS = ("scenes", "images")  # keys of eval; others are of the user's own
# What only a run that trains a denoiser reads.
DENOISER_SETTINGS = ("init", "lora", "eval", "features", "metrics")
# What ldm.evaluate does not read of a pipeline of diffusers, and of image files.
UNREAD_SETTINGS = {
    "run": (),
    "peer": ("sampler", "raw", "compile", "dtype", "autoencoder", "text_encoder", "trust", "lora"),
    "images": (
        *("sampler", "guidance", "steps", "seed", "count", "scenes", "raw", "compile", "dtype"),
        *("autoencoder", "text_encoder", "trust", "lora", "backend"),
    ),
}

ADAMW_8BIT_TARGET = "ldm.training.quantized_optimizer.AdamW8bit"
MUON_TARGET = "ldm.training.muon.Muon"
