"""Stops and file limits at given moments of a save."""

import resource
from collections.abc import Callable, Mapping

import lightning as L


class At(L.Callback):
    """Does things before certain steps, first waiting for what is being saved."""

    def __init__(self, what: Mapping[int, Callable[[], object]], *, wait: bool = True) -> None:
        self.what = what
        self.wait = wait

    def on_train_batch_start(self, trainer: L.Trainer, *args) -> None:
        if trainer.global_step + 1 in self.what:
            if self.wait:
                trainer.callbacks[-1].wait()
            self.what[trainer.global_step + 1]()


def limit_files(size: int) -> None:
    """The kernel refuses to let a file of this process grow larger."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
