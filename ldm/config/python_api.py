"""What Python code calls: `ldm.load`, `ldm.compose`, `ldm.train` and `ldm.evaluate`."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose as compose_hydra_settings
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ldm.config.adoption import adopt_published_groups, adopt_published_sampler
from ldm.config.command_line import convert_to_usage_errors, split_text_options
from ldm.config.composition import drop_hydra_settings, isolate_hydra
from ldm.config.config_check import check_config, check_run_directory, compose_config
from ldm.config.measurement import EVALUATE_TEXT_OPTIONS, record_evaluation
from ldm.config.sample_options import LOCATION_SETTINGS, check_checkpoints_and_device, list_entries
from ldm.config.search_path import CONF_DIR
from ldm.config.train_run import check_config_unchanged, train_run
from ldm.experiments.new_directories import (
    forget_new_directories,
    register_new_directories,
    remove_new_directories,
)
from ldm.experiments.run_dir import get_launcher_layout, get_launcher_rank, read_result
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import write_text
from ldm.utils.signals import StopSignals, restore_signal_handlers

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from ldm.config.loaded_pipeline import LoadedPipeline

LOAD_SETTINGS = (
    *("sampler", "guidance", "task", "raw", "frames", "decode_tile"),
    *("device", "dtype", "trust", "compile", "lora"),
)


def load(
    ckpt: "str | PathLike[str]",
    *overrides: str,
    trust: str | Sequence[str] = (),
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    lora: "str | os.PathLike[str] | Sequence[str]" = (),
) -> "LoadedPipeline":
    """Returns the pipeline of a run directory, a checkpoint file, a bundle or a published model.

    `pipe("a red star", seeds=[0, 1])` gives images. overrides: settings of sample.py that are no
    argument of that call, such as "guidance.rescale=0.7", "raw=true" or "autoencoder=DIR".
    trust: packages of your own that the checkpoint may name components of. dtype: of the networks,
    such as torch.bfloat16 or "bfloat16"; None: as trained on a GPU, float32 on a CPU. lora: files
    of adapters, such as "style.safetensors" or "style.safetensors:0.8".
    """
    import torch

    from ldm.config.pipeline import load_pipeline

    texts, words = split_text_options(overrides, LOCATION_SETTINGS)
    with isolate_hydra():
        given = _list_keyword_overrides(trust, device)
        given += [] if dtype is None else [f"dtype={str(dtype).removeprefix('torch.')}"]
        cfg = compose_config("sample", [*words, *given])
    given = [lora] if isinstance(lora, os.PathLike) else list_entries(lora)
    cfg.lora = [*list_entries(cfg.lora), *map(os.fspath, given)]
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition("@")[0]
        if key.partition(".")[0] not in LOAD_SETTINGS:
            raise UsageError(f"{word} is no setting of ldm.load: give it to the pipeline's call")
    path = os.path.expanduser(os.fspath(ckpt))
    with convert_to_usage_errors(), torch.random.fork_rng(devices=[]):
        check_checkpoints_and_device(cfg, path)
        adopt_published_sampler(cfg, path, words)
        return load_pipeline(cfg, path, dict.fromkeys(LOCATION_SETTINGS) | texts)


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Returns the settings of `ldm COMMAND overrides`, checked; `hydra.overrides.task` has these.

    A training without name=... is called by the time of this call.
    """
    commands = sorted(path.stem for path in Path(CONF_DIR).glob("*.yaml"))
    if command not in commands:
        near = suggest_nearest(command, commands) or "."
        raise UsageError(f"there is no command '{command}'{near} There are: {', '.join(commands)}")
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    with isolate_hydra(), _restore_environment():
        cfg = compose_config(command, overrides)
        with open_dict(cfg):
            if command == "train":
                cfg.name = cfg.name
            cfg.hydra = {"overrides": {"task": overrides}}
    return cfg


def train(cfg: DictConfig) -> dict:
    """Trains a configuration of `compose` in this process, and returns its result.json.

    `run_dir` is added to the result. A run that exists is resumed. A stop signal saves first and
    then takes its usual course: Ctrl-C raises KeyboardInterrupt.
    """
    is_config = isinstance(cfg, DictConfig)
    if not is_config or (words := OmegaConf.select(cfg, "hydra.overrides.task")) is None:
        raise UsageError('ldm.train: give the configuration of ldm.compose("train", [...])')
    own, words = drop_hydra_settings(cfg), list(words)
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = StopSignals(at_once=get_launcher_rank() == 0 or get_launcher_layout() is not None)
    with _isolate_process(), isolate_hydra():
        check_config(own, "train", words)
        os.environ["LDM_RUN_STAMP"] = str(cfg.name)  # the ranks compose the same name
        full = compose_hydra_settings("train", words, return_hydra_config=True)
        full.name = cfg.name
        run_dir = Path(full.hydra.run.dir)
        check_run_directory(run_dir)
        try:
            register_new_directories(run_dir)
            record_hydra_settings(full, own, run_dir)
            signals.listen()
            with signals.exit_on_signal():
                result = train_run(own, run_dir, signals)
        except SystemExit:
            result = read_result(run_dir)
        except UsageError:
            remove_new_directories()
            raise
        finally:
            forget_new_directories()
    if signals.received is not None:
        signal.raise_signal(signals.received)
    return {**result, "run_dir": str(run_dir)}


def record_hydra_settings(full: DictConfig, own: DictConfig, run_dir: Path) -> None:
    """Lets Hydra know the run, and writes .hydra/ as Hydra does for a command."""
    with read_write(full.hydra), open_dict(full.hydra):
        full.hydra.runtime.output_dir = str(run_dir.absolute())
    HydraConfig.instance().set_config(full)
    adopt_published_groups(own, run_dir)
    check_config_unchanged(own, run_dir)  # a run that is refused keeps its files
    if get_launcher_rank() == 0:
        (run_dir / ".hydra").mkdir(parents=True, exist_ok=True)
        hydra = OmegaConf.masked_copy(full, ["hydra"])
        parts = {"config": own, "hydra": hydra, "overrides": full.hydra.overrides.task}
        for name, part in parts.items():
            write_text(run_dir / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))


def evaluate(
    ckpt: "str | PathLike[str] | None" = None,
    *overrides: str,
    trust: str | Sequence[str] = (),
    device: "str | torch.device | None" = None,
) -> dict[str, float]:
    """Measures a run, a checkpoint, a bundle or a diffusers folder, and returns the metrics.

    overrides: settings of `ldm evaluate`, such as "features=none", "count=100", "out=DIR"; without
    `ckpt`, "images=FOLDER". It writes metrics.json as the command does.
    """
    texts, words = split_text_options(overrides, EVALUATE_TEXT_OPTIONS)
    if ckpt is not None:
        texts["ckpt"] = os.path.expanduser(os.fspath(ckpt))
    with _isolate_process(), isolate_hydra():
        cfg = compose_config("evaluate", [*words, *_list_keyword_overrides(trust, device)])
        options = {name: cfg[name] for name in EVALUATE_TEXT_OPTIONS} | texts
        with convert_to_usage_errors():
            record = record_evaluation([({}, cfg)], options, words)
    return {} if record is None else record.results[0]["metrics"]


def _list_keyword_overrides(
    trust: str | Sequence[str], device: "str | torch.device | None"
) -> list[str]:
    packages = trust if isinstance(trust, str) else ",".join(trust)
    words = [f"trust=[{packages}]"] if packages else []
    return words if device is None else [*words, f"device={device}"]


@contextmanager
def _isolate_process() -> Iterator[None]:
    """Restores what a training changes outside of its run: signals, random states, environment."""
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    threads = torch.get_num_threads()
    with (
        _restore_environment(),
        restore_signal_handlers(),
        isolate_rng(),
        warnings.catch_warnings(),
    ):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
