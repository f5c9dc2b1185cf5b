"""The command of a tiny run that signals stop."""

RUN = [
    *("trainer=cpu", "trainer.log_every_n_steps=1", "trainer.val_check_interval=1000"),
    *("logger=csv", "data=scenes", "data.count=30", "data.val_count=8", "data.size=16"),
    *("data.batch_size=4", "data.workers=2", "autoencoder=identity", "model.channels=16"),
    *("model.groups=8", "model.multipliers=[1]", "model.attention=[false]"),
    *(
        "optimizer.warmup=1",
        "optimizer.decay=constant",
        "samples.n=1",
        "samples.steps=1",
        "checkpoint.every=5",
    ),
]
