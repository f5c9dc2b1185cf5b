"""Settings of a training run that do not fit together, refused with a remedy."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from ldm.config.cache_settings import is_cached
from ldm.config.reserved_settings import ADAMW_8BIT_TARGET, MUON_TARGET, OUR_EVALUATIONS
from ldm.config.sample_options import check_checkpoints_exist, get_compile_mode, list_guides
from ldm.config.size_multiple import read_size_multiple
from ldm.config.value_rules import format_setting_value
from ldm.data.pixel_area import are_bucket_sizes, parse_pixels
from ldm.data.position_sampler import split_batch
from ldm.data.shards.data_sets import list_data_sets, list_locations
from ldm.data.shards.locations import is_url, locate_shards
from ldm.experiments.run_dir import get_launcher_layout
from ldm.utils.errors import UsageError, format_program

if TYPE_CHECKING:
    from torch import nn

    from ldm.data.datamodule import TextImageData


def check_before_imports(cfg: DictConfig, run_dir: Path) -> None:
    """Refuses what the settings alone show to be wrong, before the slow imports."""
    new = not any((run_dir / "checkpoints").glob("step=*.ckpt"))
    check_checkpoints_exist(list_guides(cfg) | ({"init": cfg.init} if new else {}))
    check_data_sets(cfg)
    for name in ("train", "val"):
        check_data_exist(cfg.data.get(name))
    check_buckets(cfg)
    check_image_size(cfg.data.size, read_size_multiple(cfg, stage=cfg.stage))
    check_frozen_paths(cfg)
    check_strategy(cfg)
    check_lora(cfg)
    devices, nodes = get_launcher_layout() or (cfg.trainer.devices, cfg.trainer.num_nodes)
    count = devices if isinstance(devices, int) and devices > 0 else 1  # or not known yet
    split_batch(cfg.data.batch_size, count * nodes, cfg.trainer.accumulate_grad_batches)
    get_devices(cfg)


def check_frozen_paths(cfg: DictConfig) -> None:
    """UsageError for a component that cannot be trained, or that must be trained before."""
    if cfg.stage == "autoencoder":
        kind = str(cfg.autoencoder._target_).rpartition(".")[2]
        if kind in ("IdentityAutoencoder", "DiffusersAutoencoder"):
            raise UsageError(
                f"stage=autoencoder trains an AutoencoderKL, and {kind} is none: take "
                "autoencoder=tiny or autoencoder=sd, with autoencoder.path=null"
            )
    decodes = cfg.samples.n or cfg.eval
    if cfg.stage not in ("diffusion", "classifier") or (is_cached(cfg) and not decodes):
        return
    for name, experiment in (("autoencoder", "autoencoder_coco"), ("text_encoder", "clip_coco")):
        path = cfg[name].get("path", "none needed")
        if path is None:
            raise UsageError(
                f"{name}.path is needed: a trained {name.replace('_', ' ')} that the denoiser "
                f"needs. Train one with `{format_program('train')} experiment={experiment}`, then "
                f"give {name}.path=runs/{experiment}, or the folder or hub name of a published one"
            )
        is_local = str(path).startswith(("runs/", "/", "./", "../", "~"))  # no name on the hub
        if is_local and not Path(path).expanduser().exists():
            raise UsageError(f"{name}.path={path}: there is no such run or folder")


def check_strategy(cfg: DictConfig) -> None:
    """UsageError where the denoiser cannot be compiled, or its optimizer cannot be sharded."""
    mode, is_sharded = get_compile_mode(cfg), "fsdp" in (cfg.strategy or {}).get("_target_", "")
    if is_sharded and cfg.optimizer._target_ == ADAMW_8BIT_TARGET:
        raise UsageError("strategy=fsdp shares out float32 moments alone: take optimizer=adamw")
    if is_sharded and cfg.optimizer._target_ == MUON_TARGET:
        raise UsageError(
            "optimizer=muon: strategy=fsdp gives a device a share of each matrix, and Muon needs "
            "all of it: take strategy=ddp or optimizer=adamw"
        )
    if mode is not None and cfg.stage != "diffusion":
        raise UsageError(
            f"compile={mode} is for the denoiser, and stage={cfg.stage} trains none: leave it out"
        )
    if mode is not None and is_sharded:
        raise UsageError(
            f"compile={mode}: strategy=fsdp gathers the weights of each block by itself, and a "
            "compiled network is one graph: take strategy=ddp or compile=off"
        )
    if mode == "reduce-overhead" and cfg.trainer.accumulate_grad_batches > 1:
        # https://github.com/pytorch/pytorch/issues/169545
        raise UsageError(
            "compile=reduce-overhead: a CUDA graph overwrites the gradients of the batch before, "
            "which trainer.accumulate_grad_batches adds up: take compile=default"
        )


def check_lora(cfg: DictConfig) -> None:
    """UsageError for settings of LoRA that do not go together with the others."""
    if not cfg.lora.rank:
        if cfg.lora.alpha is not None or cfg.lora.targets != "attention":
            raise UsageError(
                "lora.alpha and lora.targets are read with lora.rank alone: add lora.rank=8, or "
                "leave them out"
            )
        return
    if cfg.init is None:
        raise UsageError(
            f"lora.rank={cfg.lora.rank} trains adapters of a network that is trained already: give "
            "init=RUN, a run of ours or a diffusers folder, or leave lora.rank out"
        )
    if "fsdp" in (cfg.strategy or {}).get("_target_", ""):
        raise UsageError(
            f"lora.rank={cfg.lora.rank}: strategy=fsdp shares out weights that are trained, and "
            "here they are frozen: take strategy=ddp"
        )


def check_data_exist(source: object) -> None:
    """FileNotFoundError where a folder or files of shards are not there; servers are not asked."""
    for place in list_locations(source or []):
        if not is_url(str(place)):
            locate_shards(str(place))


def get_devices(cfg: DictConfig) -> dict[str, int]:
    """Devices and machines of torchrun or srun, where these started the processes; else nothing."""
    import torch

    kind = cfg.trainer.accelerator
    has_gpu = torch.cuda.is_available() or (kind != "cuda" and torch.backends.mps.is_available())
    if kind in ("gpu", "cuda") and not has_gpu:
        raise UsageError(
            f"trainer.accelerator={kind} (trainer=gpu sets it): torch finds no GPU here. Give "
            "trainer=cpu, or look what `nvidia-smi` says and whether torch was built for CUDA"
        )
    wanted = cfg.trainer.devices, cfg.trainer.num_nodes
    started = get_launcher_layout()
    if wanted[0] == -1 and (cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()):
        raise UsageError(
            "trainer.devices=-1 means all GPUs, and there is none to use here: leave it out, or "
            "give a number of processes"
        )
    if started is None:
        return {}
    if wanted[0] != "auto" and wanted not in ((1, 1), started):
        raise UsageError(
            f"{started[0]} processes on each of {started[1]} machines were started, and "
            f"trainer.devices={wanted[0]}, trainer.num_nodes={wanted[1]} ask for others: leave "
            "them out, the launcher's numbers are taken"
        )
    return {"devices": started[0], "num_nodes": started[1]}


def check_image_size(size: int, multiple: int, *, name: str = "data.size") -> None:
    """UsageError where images of `size` do not go through the networks."""
    if size % multiple:
        raise UsageError(
            f"{name}={size} must be a multiple of {multiple}, which the networks halve it to"
        )


def check_buckets(cfg: DictConfig) -> None:
    """UsageError for settings of buckets that contradict each other, or that nothing reads."""
    buckets, pixels = cfg.data.get("buckets"), cfg.data.get("pixels")
    if pixels is not None:
        parse_pixels(pixels)
        if buckets != "auto":
            raise UsageError(
                f"data.pixels={pixels} is the area of data.buckets=auto: add that, or leave "
                "data.pixels out"
            )
    if buckets is None:
        return
    shown = format_setting_value(OmegaConf.to_container(cfg.data)["buckets"])
    if buckets != "auto" and not are_bucket_sizes(buckets):
        raise UsageError(
            f"data.buckets={shown} must be auto, or sizes such as [[768,512],[512,768]] (width, "
            "height)"
        )
    if cfg.data.get("frames") is not None:
        raise UsageError(f"data.buckets={shown} are of images: leave data.frames out")
    if cfg.stage not in ("diffusion", "autoencoder"):
        raise UsageError(
            f"data.buckets={shown}: stage={cfg.stage} takes images of one size: leave it out"
        )
    if cfg.stage == "diffusion" and cfg.style_encoder:
        raise UsageError(f"data.buckets={shown}: a style image is a square: leave either out")
    if get_compile_mode(cfg) == "reduce-overhead":
        raise UsageError(f"data.buckets={shown}: a CUDA graph is of one size: take compile=default")
    if buckets != "auto":
        if len({*map(tuple, buckets)}) < len(buckets):
            raise UsageError(f"data.buckets={shown}: one of the sizes is there twice")
        check_bucket_sizes(buckets, read_size_multiple(cfg, stage=cfg.stage))


def check_data_sets(cfg: DictConfig) -> None:
    """UsageError for data sets whose weights or sizes nothing can follow."""
    try:
        data_sets, val = (list_data_sets(cfg.data.get(name) or []) for name in ("train", "val"))
    except ValueError as error:
        raise UsageError(f"data.train: {error}") from None
    if val:
        raise UsageError("data.val: weights and sizes are for data.train; give locations alone")
    sides = [one.size for one in data_sets if one.size]
    if not sides:
        return
    if cfg.data.get("buckets") not in (None, "auto"):
        raise UsageError(
            f"data.train: size={sides[0]} of a data set has buckets of its own: give "
            "data.buckets=auto in place of the list, or leave the size out"
        )
    if is_cached(cfg):
        raise UsageError(
            f"data.train: size={sides[0]}: a cache has the size of its own: leave it out"
        )
    if cfg.data.get("frames") is not None or cfg.stage not in ("diffusion", "autoencoder"):
        raise UsageError(f"data.train: size={sides[0]} of a data set: this run takes one size")
    if get_compile_mode(cfg) == "reduce-overhead":
        raise UsageError(
            f"data.train: size={sides[0]}: a CUDA graph is of one size: take compile=default"
        )
    for side in sides:
        multiple = read_size_multiple(cfg, stage=cfg.stage)
        check_image_size(side, multiple, name="data.train: size")


def check_bucket_sizes(buckets: Iterable[Sequence[int]], multiple: int) -> None:
    """UsageError where images of these sizes, width and height, do not go through the networks."""
    for size in buckets:
        if wrong := [side for side in size if side % multiple]:
            raise UsageError(
                f"data.buckets has [{size[0]},{size[1]}]: {wrong[0]} is no multiple of {multiple}, "
                "which the networks halve it to"
            )


def check_data_kind(cfg: DictConfig, subject: str, *, is_video: bool) -> None:
    """UsageError where one of data and `subject` is of images and the other of videos."""
    if is_video != (cfg.data.get("frames") is not None):
        have, want = ("images", "videos") if is_video else ("videos", "images")
        remedy = "task=video, or other data"
        if is_video:
            remedy = "data.frames=8" if "frames" in cfg.data else "data=shards of videos"
            still = any(not check.get("moving", False) for _, check in _find_measurements(cfg))
            remedy = f"data=moving_scenes, or {remedy}{' eval=motion' if still else ''}"
        raise UsageError(f"{subject} is of {want}, and the data are {have}: take {remedy}")
    for name, check in _find_measurements(cfg):
        if check.get("moving", False) != is_video and cfg.stage == "diffusion":
            remedy = "eval=motion, or eval=none" if is_video else "another eval"
            raise UsageError(f"eval.{name} does not measure what the data are: take {remedy}")


def _find_measurements(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """Our own entries of `eval`, which are for images or, with `moving`, for videos."""
    return [(name, cfg.eval[name]) for name in OUR_EVALUATIONS if name in (cfg.eval or ())]


def check_has_captions(data: "TextImageData") -> None:
    """UsageError where no training image has a caption."""
    index = data.train_set.shards.index
    keys = tuple(index.caption_weights)
    if index.captions.count_empty(*keys) == index.captions.samples:
        message = index.captions.describe(*keys)
        raise UsageError(f"data.train: {message}. To train without captions: text_encoder=none")


def check_captions_readable(text_encoder: "nn.Module", data: "TextImageData") -> None:
    """Refuses captions that this text encoder cannot read before the first batches."""
    if text_encoder.width or text_encoder.pooled_width:
        check_has_captions(data)
    if text_encoder.names:
        text_encoder(data.val_captions(64))
