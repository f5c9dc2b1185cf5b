"""What a run asks of its loggers, beyond the methods of Lightning's `Logger`."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Protocol

from lightning.pytorch.loggers.logger import Logger
from PIL import Image


class RunLogger(Protocol):
    """A Lightning logger of a run; each method does nothing unless a logger overrides it."""

    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Logs images of one optimizer step."""
        return

    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence]) -> None:
        """Logs a table."""
        return

    def alert(self, title: str, text: str) -> None:
        """Tells the owner of the run of a failure, a preemption or steps that are not finite."""
        return

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, where a run resumes."""
        return

    def finish(self, *, status: str) -> None:
        """Closes the run's log; status: finished, failed or preempted, as in result.json."""
        return


def add_run_methods(logger: Logger) -> Logger:
    """Returns a Lightning logger with the methods of RunLogger that its class lacks."""
    kind = type(logger)
    if RunLogger not in kind.__mro__:
        logger.__class__ = type(kind.__name__, (kind, RunLogger), {"__module__": kind.__module__})
    return logger


def keep_training(service: str) -> Callable[[Callable], Callable]:
    """Makes a logger's method print an error, the first of its object, and not raise it."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def call(self: Logger, *args: object, **kwargs: object) -> None:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                if not self.__dict__.get("has_warned"):
                    what = next(iter((*args, *kwargs.values())), method.__name__)
                    names = ", ".join(what) if isinstance(what, Mapping) else what
                    print(f"{service} did not take {names}: {format_first_line(error)}", flush=True)
                self.has_warned = True

        return call

    return decorate


def format_first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def split_run_name(name: str, overrides: Sequence[str]) -> tuple[str, str, list[str]]:
    """Returns sweep, job and the settings that set the job apart; of `a/b` the sweep is `a`."""
    sweep, _, job = str(name).rpartition("/")
    varied = [text for text in overrides if f",{text.partition('=')[0]}=" in f",{job}"]
    return sweep, job, list(dict.fromkeys(varied))
