"""Scores of the samples of shards, for `ldm prepare scores`: copies whose json has them."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from ldm.config.command_line import require_option
from ldm.config.components import build_feature_extractors
from ldm.data.image_decoding import crop_and_resize, pil_to_tensor, read_image
from ldm.data.prepare.scored_shards import check_shard_names, copy_shard, is_copied
from ldm.data.prepare.writer import claim_output_folder
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.near_duplicates import (
    DUPLICATE_THRESHOLDS,
    find_nearest_pictures,
    group_near_duplicates,
)
from ldm.evaluation.sample_scores import SampleScores, rank_in_groups, tabulate_pictures
from ldm.models.text.packaged import PACKAGED_CLIP
from ldm.utils.errors import UsageError
from ldm.utils.files import read_json, resolve_path, write_json
from ldm.utils.images import make_captioned_grid, save_png
from ldm.utils.text import get_progress_interval

NO_CLIP_WORDS = ("none", "null", "false", "")
PAIRS_SHOWN = 16  # on a page of the nearest pairs
PAIR_IMAGE_SIZE = 192  # pixels
_bar = partial(tqdm, unit="image", mininterval=get_progress_interval())


def prepare_scores(cfg: DictConfig, paths: dict[str, str | None]) -> str:
    """Writes copies of shards with scores in the json of each sample; returns the summary."""
    out = resolve_path(require_option(paths, "out"))
    shards = open_scored_shards(cfg, require_option(paths, "shards"))
    sources = shards.index.paths
    check_shard_names(sources)
    against = paths.get("against")
    training = open_scored_shards(cfg, against) if against else None
    clip, network = build_scoring_networks(cfg, paths["clip"])
    if training is not None and network is None:
        raise UsageError("against=... compares features: give features=efficientnet")
    threshold = None if network is None else choose_threshold(cfg.threshold, network.name)
    facts = {"shards": shards.index.fingerprint, "threshold": threshold}
    facts |= {"clip": clip and clip.digest, "features": network and network.digest}
    facts |= {"against": training and training.index.fingerprint}
    claim_output_folder(out, facts)
    report_file = out / "report.json"
    if report_file.is_file() and all(is_copied(path, out) for path in sources):
        return format_score_report(read_json(report_file), out)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    how = {"network": network, "batch": cfg.batch, "workers": cfg.workers, "device": device}
    with _bar(desc="Scoring", total=len(shards)) as bar:
        table = tabulate_pictures(
            shards, clip=clip, folder=out / "pieces", done=lambda i: bar.update(len(i)), **how
        )
    keys = [shards.index.key(i) for i in range(len(shards))]
    scores = SampleScores(keys=keys, table=table, threshold=threshold)
    if network is not None:
        with _bar(desc="Comparing", total=len(shards)) as bar:
            scores.group, scores.pairs = group_near_duplicates(
                table.features,
                threshold=threshold,
                most=PAIRS_SHOWN,
                device=device,
                done=bar.update,
            )
        scores.rank = rank_in_groups(scores.group, table.sizes.prod(1).numpy())
        pairs = [(pair.first, pair.second, pair.cosine) for pair in scores.pairs]
        draw_pairs(out / "duplicates.png", shards, shards, pairs)
    if training is not None:
        with _bar(desc="Scoring against", total=len(training)) as bar:
            other = tabulate_pictures(
                training, folder=out / "pieces-against", done=lambda i: bar.update(len(i)), **how
            )
        with _bar(desc="Comparing", total=len(shards)) as bar:
            nearest, scores.similarity = find_nearest_pictures(
                table.features, other.features, device=device, done=bar.update
            )
        scores.training_keys = [training.index.key(i) for i in nearest]
        rows = scores.list_nearest_training(PAIRS_SHOWN)
        pairs = [(i, int(nearest[i]), float(scores.similarity[i])) for i in rows]
        draw_pairs(out / "training_duplicates.png", shards, training, pairs)
    write_scored_shards(shards, scores, out)
    report = scores.describe()
    write_json(report_file, report)
    for pieces in ("pieces", "pieces-against"):
        shutil.rmtree(out / pieces, ignore_errors=True)
    return format_score_report(report, out)


def open_scored_shards(cfg: DictConfig, place: str) -> ShardReader:
    """The shards of `shards` or `against`."""
    return ShardReader(place, ReadOptions(caption_key=cfg.caption_key, read_only=True))


def build_scoring_networks(cfg: DictConfig, name: str | None) -> tuple[ClipFeatures | None, Any]:
    """The CLIP, and the network that finds near-duplicates; None for one that is not wanted."""
    name, clip = str(name), None
    if name.lower() not in NO_CLIP_WORDS:
        clip = ClipFeatures(PACKAGED_CLIP if name.lower() == "true" else name)
    if clip is not None and name.lower() in ("true", PACKAGED_CLIP):
        print(
            "clip=packaged:clip knows only the drawn world, and its scores of other images say "
            "nothing: give clip=openai/clip-vit-base-patch32, a folder or a run of stage=clip"
        )
    networks = build_feature_extractors(cfg) if cfg.near_duplicates else []
    if len(networks) > 1:
        raise UsageError("one network finds near-duplicates: give features=efficientnet")
    return clip, networks[0] if networks else None


def choose_threshold(threshold: float | None, network: str) -> float:
    """The cosine from which two pictures are near-duplicates."""
    if threshold is None and network not in DUPLICATE_THRESHOLDS:
        raise UsageError(
            f"features={network} needs a threshold, the cosine from which two pictures are "
            f"near-duplicates: give threshold=0.95. Of {', '.join(DUPLICATE_THRESHOLDS)} one is "
            "measured"
        )
    return float(DUPLICATE_THRESHOLDS[network] if threshold is None else threshold)


def write_scored_shards(shards: ShardReader, scores: SampleScores, out: Path) -> None:
    """Writes a copy of each shard, and their index."""
    index, fields = shards.index, scores.list_fields()
    for number, path in enumerate(_bar(index.paths, desc="Writing", unit="shard")):
        own = (index.shard == number).nonzero()[0].tolist()
        rows = {index.key(i, errors="surrogateescape"): fields[i] for i in own if fields[i]}
        copy_shard(path, out, rows)
    open_index(out)


def format_score_report(report: dict[str, Any], out: Path) -> str:
    """The report in a few lines."""
    lines, count = [], report["samples"] - len(report["unreadable"])
    if clip := report.get("clip"):
        lines.append(f"clip: {', '.join(f'{name} {value}' for name, value in clip.items())}")
    if "duplicates" in report:
        lines.append(
            f"{report['duplicates']} of {count} pictures are near-duplicates (cosine from "
            f"{report['threshold']} on) of another that stays: duplicate_rank > 0"
        )
    if "duplicates_of_training" in report:
        lines.append(
            f"{report['duplicates_of_training']} of {count} pictures have a near-duplicate in "
            f"against=..; the nearest pairs: {out}/training_duplicates.png"
        )
    if report["unreadable"]:
        lines.append(f"{len(report['unreadable'])} unreadable pictures have no scores")
    return "\n".join([*lines, f"{report['samples']} samples in {out}"])


def draw_pairs(
    path: Path, shards: ShardReader, others: ShardReader, pairs: Sequence[tuple[int, int, float]]
) -> None:
    """Draws pairs of pictures side by side, with their cosine; no file without pairs."""
    images, labels = [], []
    for first, second, cosine in pairs:
        for reader, i in ((shards, first), (others, second)):
            image = crop_and_resize(read_image(reader.read(i).image), PAIR_IMAGE_SIZE)
            images.append(pil_to_tensor(image).float() / 127.5 - 1)
            labels.append(reader.index.key(i))
        labels[-2] = f"{cosine:.3f}  {labels[-2]}"
    if images:
        save_png(make_captioned_grid(torch.stack(images), labels, columns=4), path, {})
