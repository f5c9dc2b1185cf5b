"""What sample.py is asked for: what cannot be meant is refused before anything is loaded."""

import os
import sys
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, ListConfig

from ldm.cli import UsageError

FILES = ("image", "mask", "style", "prompts")
PLACES = ("ckpt", "out", "autoencoder", "text_encoder", "style_encoder")
TEXTS = ("prompt", "negative", "source", *FILES, *PLACES)
# The least that a whole number may be, how many of them there are, and whether null will do.
WHOLE = {
    "n": (1, (1,), False),
    "seed": (0, (1,), False),
    "steps": (1, (1,), False),
    "batch": (1, (1,), False),
    "previews": (0, (1,), False),
    "frames": (1, (1,), True),
    "size": (1, (1, 2), True),
    "pad": (0, (4,), False),
}
# Above 0 and up to this.
POSITIVE = {"fps": 1000, "strength": 1}


def checked(
    cfg: DictConfig, asked: Mapping[str, str | None], typed: Mapping[str, str]
) -> dict[str, str | None]:
    """`asked`, the texts, with `~` in paths expanded; typed: those of the command line.

    Raises UsageError for numbers out of range, files that are not there, and what contradicts.
    """
    for name, rule in WHOLE.items():
        check_whole(name, cfg[name], *rule)
    for name, most in POSITIVE.items():
        value, optional = cfg[name], name == "strength"
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not (plain and 0 < value <= most) and not (value is None and optional):
            raise UsageError(f"{name}={value} is no number above 0 and up to {most}")
    paths = {name: asked.get(name) or None for name in FILES + PLACES}
    asked = {**asked, **{name: path and os.path.expanduser(path) for name, path in paths.items()}}
    for name in FILES:
        check_file(name, asked[name])
    inverts = bool((cfg.get("task") or {}).get("invert"))
    contradictions = {
        "ckpt and cascade: give either": cfg.cascade and asked.get("ckpt"),
        "prompt and prompts: give either": "prompt" in typed and asked["prompts"],
        "source says what image shows for task=img2img task.invert=true alone: leave it out, or "
        "add those": asked["source"] and not inverts,
        "paste=true is for what mask=FILE or pad=[..] keeps: give one of them": cfg.paste
        and not (asked["mask"] or any(cfg.pad)),
    }
    for said, applies in contradictions.items():
        if applies:
            raise UsageError(said)
    if inverts and not asked["source"]:
        tell('task.invert=true without source="what image shows": as if nothing were known of it')
    if "style_scale" in cfg.guidance and not asked["style"]:
        tell("guidance.style_scale does nothing without style=FILE")
    return asked


def check_whole(
    name: str, value: object, least: int, counts: Sequence[int], optional: bool
) -> None:
    """UsageError unless `value` is a whole number from `least` on, or as many as `counts` say."""
    if value is None and optional:
        return
    many = list(value) if isinstance(value, ListConfig) else [value]
    if len(many) not in counts or any(type(each) is not int or each < least for each in many):
        said = {1: "a whole number", 2: "two of them, [height,width]"}
        said[4] = "four whole numbers of pixels, [left,above,right,below]"
        kinds = " or ".join(said[count] for count in counts)
        shown = f"[{','.join(map(str, many))}]" if isinstance(value, ListConfig) else value
        raise UsageError(f"{name}={shown}: it is {kinds}, {least} or more")
    if max(many) >= 2**63:
        raise UsageError(f"{name}={max(many)} is too large")


def check_file(name: str, path: str | None) -> None:
    """UsageError, with the option's name, where a path that was given is no file."""
    if path and not os.path.isfile(path):
        why = "is a folder, not a file" if os.path.isdir(path) else "there is no such file"
        raise UsageError(f"{name}={path}: {why}")


def tell(said: str) -> None:
    """A line that is no error, beside what is printed for other programs to read."""
    print(said, file=sys.stderr)


def runs_of(cfg: DictConfig) -> list[str]:
    """The runs of `cascade`, a list or one alone, with `~` expanded."""
    cascade = [cfg.cascade] if isinstance(cfg.cascade, str) else cfg.cascade or []
    return [os.path.expanduser(str(ckpt)) for ckpt in cascade]
