"""Everything that touches Lightning's private or undocumented parts, of Lightning 2.6.

Each function names what it touches and why. Nothing else in ldm/ touches these parts.
"""

import atexit
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from ldm.utils.signals import STOP_SIGNALS, block_stop_signals

RANK_EXIT_TIMEOUT = 3.0  # seconds that other ranks get to end by themselves
NO_CONTEXT = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler without a generator for each of some seventy calls a step."""

    def profile(self, action_name: str) -> AbstractContextManager:
        """Returns a context that does nothing."""
        return NO_CONTEXT


def set_max_steps(trainer: L.Trainer, max_steps: int) -> None:
    """Sets the step after which `fit` ends.

    `fit_loop.epoch_loop.max_steps`: Trainer.max_steps has no setter.
    """
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def run_validation(trainer: L.Trainer) -> None:
    """Validates inside `fit`, before the next training step.

    `fit_loop.epoch_loop.val_loop`: `trainer.validate` cannot be called inside `fit`.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def count_micro_steps(trainer: L.Trainer) -> int:
    """Returns the number of micro-batches of the run so far.

    `fit_loop.epoch_loop.total_batch_idx`: Trainer counts optimizer steps only.
    """
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def correct_logging_step(trainer: L.Trainer) -> None:
    """Has the metrics that callbacks log in training belong to the optimizer steps so far.

    `fit_loop.epoch_loop._batches_that_stepped`: in a resumed run it is one too many.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def count_resumed_batches(trainer: L.Trainer) -> int | None:
    """Returns the batches of the epoch that were trained before a resume in its middle, else None.

    `fit_loop.restarted_mid_epoch`, `batch_progress`: on_train_epoch_start is not called then.
    """
    if not trainer.fit_loop.restarted_mid_epoch:
        return None
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def reset_loop_progress(checkpoint: dict, micro_steps: int) -> None:
    """Sets the loops' counters in a checkpoint to `micro_steps`, with no validation under way.

    `checkpoint["loops"]`: Lightning counts micro-batches. With another accumulation, the next step
    would be cut short. A validation that is due would skip as many batches as the last one had.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        ended = micro_steps - (count["processed"] - count["completed"])
        count.update(dict.fromkeys(count, micro_steps), completed=ended)
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validation["total"], validation["current"]):
        count.update(dict.fromkeys(count, 0))


def replace_signal_handlers(trainer: L.Trainer, listen: Callable[[], None]) -> None:
    """Has Lightning call `listen` where it would install its own signal handlers.

    `_signal_connector`: the handlers save in the middle of a step, wait for ranks that may wait
    for something else, and exit with 0. Trainer has no switch for them.
    `_broadcast_sigterm_tensor`: with several ranks it sends their flag, which then never changes,
    before each batch, and waits for the device.
    """
    trainer._signal_connector.register_signal_handlers = listen
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def defer_launch_signals(trainer: L.Trainer) -> None:
    """Blocks stop signals in the ranks that Lightning starts until they can handle them.

    `strategy.launcher`: a rank that ended during its imports would have Lightning kill all ranks.
    """
    launcher = trainer.strategy.launcher
    if not hasattr(launcher, "procs"):
        return
    launch = launcher.launch

    def launch_blocked(function: Callable, *args, **kwargs) -> object:
        def unblock_and_run(*args, **kwargs) -> object:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return function(*args, **kwargs)

        with block_stop_signals():
            return launch(unblock_and_run, *args, **kwargs)

    launcher.launch = launch_blocked


def detach_ranks(trainer: L.Trainer) -> None:
    """Ends the ranks that Lightning started when this process ends, and not before.

    `launcher.procs`: within 5 seconds after a rank has failed, Lightning kills all of them and
    this process, which may still write a checkpoint or result.json.
    """
    procs = getattr(trainer.strategy.launcher, "procs", [])
    if procs:
        atexit.register(end_processes, list(procs))
        procs.clear()


def end_processes(processes: list[subprocess.Popen]) -> None:
    """Waits for processes to end; kills those that do not in `RANK_EXIT_TIMEOUT` seconds."""
    deadline = time.monotonic() + RANK_EXIT_TIMEOUT
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()


def replace_gradient_clipping(
    trainer: L.Trainer, measure_norm: Callable[[Optimizer, list[Tensor]], Tensor]
) -> None:
    """Has Lightning clip by the norm that `measure_norm` returns, instead of by one of its own.

    measure_norm: gets the optimizer and its weights.

    `configure_gradient_clipping` of the module, which is called before each optimizer step, after
    the callbacks: a hook of the module alone, so that a callback has to replace it.
    """

    def clip(
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = measure_norm(optimizer, weights)
        if gradient_clip_algorithm == "value":
            how = {"gradient_clip_algorithm": gradient_clip_algorithm}
            trainer.lightning_module.clip_gradients(optimizer, gradient_clip_val, **how)
        elif gradient_clip_val:
            clip_grads_with_norm_(weights, gradient_clip_val, norm)

    trainer.lightning_module.configure_gradient_clipping = clip


def allow_gradient_clipping(optimizer: Optimizer) -> None:
    """Lets Lightning clip gradients of a fused optimizer.

    `_step_supports_amp_scaling`, of torch: Lightning refuses to clip where it is true.
    """
    optimizer._step_supports_amp_scaling = False
