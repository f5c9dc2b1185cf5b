"""python -m ldm.clip image=a.png text="a red star" | data=DIR text=.. | ..; --help has them all."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.command_line import (
    FREE_TEXT_OPTIONS,
    convert_to_usage_errors,
    pop_text_options,
    run_command,
)
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.data.prepare.sources import IMAGE_SUFFIXES, list_image_files
from ldm.utils.errors import UsageError
from ldm.utils.files import read_text, reserve_files, resolve_path
from ldm.utils.output_path import prepare_output_file
from ldm.utils.text import escape_control_characters, replace_invalid_bytes

REPEATABLE_OPTIONS = ("image", "text")  # may be given several times
CLIP_TEXT_OPTIONS = (
    "clip",
    *REPEATABLE_OPTIONS,
    "minus",
    "texts",
    "data",
    "labels",
    "words",
    "template",
    "out",
)
# What each question needs, and what it may be given beside.
CLIP_QUERY_OPTIONS = {
    "difference": (["image", "minus"], ["words", "template", "data"]),
    "label": (["image", "labels"], ["template", "data"]),
    "search": (["data"], ["image", "text", "out"]),
    "recall": (["data"], []),
    "similarity": (["image", "text"], []),
}


def main() -> None:
    """Compose, ask, print."""
    many = {name: read_repeated_option(name) for name in REPEATABLE_OPTIONS}
    texts = pop_text_options(CLIP_TEXT_OPTIONS)

    @hydra.main(config_path=command_line.CONF_DIR, config_name="clip", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        kind = choose_query({name for name, value in texts.items() if value})
        with convert_to_usage_errors():
            print(
                answer_query(
                    cfg, {name: cfg[name] for name in CLIP_TEXT_OPTIONS} | texts | many, kind
                )
            )

    run_command(composed, "clip")


def read_repeated_option(name: str) -> list[str]:
    """All values that the command line gives a name, as `cli.take_text` has them."""
    words = [word.partition("=") for word in sys.argv[1:]]
    values = [value for key, _, value in words if key == name and value]
    return [
        replace_invalid_bytes(value) if name in FREE_TEXT_OPTIONS else os.path.expanduser(value)
        for value in values
    ]


def choose_query(names: set[str]) -> str:
    """What is asked, by the names of what is given; UsageError where that is no question."""
    names = {"text" if name == "texts" else name for name in names} - {"clip"}
    if "minus" in names:
        kind = "difference"
    elif "labels" in names:
        kind = "label"
    elif "data" in names:
        kind = "search" if names & {"image", "text"} else "recall"
    else:
        kind = "similarity"
    needed, more = CLIP_QUERY_OPTIONS[kind]
    if not set(needed) <= names:
        raise UsageError(
            "give image=.. and text=.. (or texts=FILE) for their similarity; data=DIR and one of "
            "them for a search; data=DIR alone for recall; image=.. and labels=a,b,c for "
            "probabilities; image=.. and minus=.. for the words that differ"
        )
    if stray := sorted(names - {*needed, *more}):
        raise UsageError(
            f"{stray[0]}=.. has no part in this: {kind} takes {', '.join([*needed, *more])}"
        )
    return kind


def answer_query(cfg: DictConfig, options: dict, kind: str) -> str:
    """The lines to print; a search leaves a picture as well.

    Raises UsageError for what cannot be asked, OSError and ValueError where files are not what they
    should be.
    """
    paths = [path for name in options["image"] or () for path in find_option_images("image", name)]
    others = find_option_images("minus", options["minus"]) if kind == "difference" else []
    texts = [
        *(options["text"] or ()),
        *(read_option_lines("texts", options["texts"]) if options["texts"] else ()),
    ]
    words = read_option_list("words", options["words"]) if options["words"] else None
    labels = read_option_list("labels", options["labels"]) if kind == "label" else []
    templates = [options["template"] or ""]
    if "{}" not in templates[0]:
        templates = (
            read_option_lines("template", options["template"]) if options["template"] else []
        )
    if any("{}" not in template for template in templates):
        raise UsageError(f"template={options['template']} has a line without {{}} for the word")
    if kind == "difference" and len(paths) + len(others) > 2:
        raise UsageError("image=.. and minus=.. are one picture each, and no folders")
    if kind == "search" and len(paths) + len(texts) > 1:
        raise UsageError("a search is for one text or one picture: give one of them")

    check_checkpoints_and_device(cfg)
    wanted = prepare_output_file(options["out"], Path("retrieved.png"), moving=False)
    from ldm.evaluation.clip_queries import (  # with torch and transformers: seconds
        RECALL_CUTOFFS,
        ClipQueries,
    )
    from ldm.utils.images import save_png

    how = {"cache": resolve_path(cfg.cache), "batch": cfg.batch, "device": cfg.device}
    clip = ClipQueries(options["clip"], data=options["data"], templates=templates, **how)
    if len(paths) > 1:  # a folder may hold what is none
        paths = clip.readable(paths) or paths[:1]
    if kind == "similarity":
        rows = sort_pairs_by_value(paths, texts, clip.similarity(paths, texts).tolist())
        rows = [[f"{v:.3f}", f"{100 * max(v, 0):.1f}", *rest] for v, *rest in rows]
        return format_columns(["cosine", "CLIP score", "picture", "text"], rows)
    if kind == "label":
        rows = sort_pairs_by_value(paths, labels, clip.classify_labels(paths, labels).tolist())
        return format_columns(
            ["share", "picture", "label"], [[f"{v:.3f}", *rest] for v, *rest in rows]
        )
    if kind == "difference":
        found = clip.difference(paths[0], others[0], words, most=cfg.most)
        return format_columns(
            ["cosine", "word"], [[f"{v:.3f}", word] for word, v in found[: cfg.top]]
        )
    if kind == "recall":
        rows = [
            [*(f"{v:.3f}" for v in shares), way] for way, shares in clip.compute_recall().items()
        ]
        return format_columns([*(f"at {k}" for k in RECALL_CUTOFFS), "from"], rows)
    found, page = clip.search([*paths, *texts][0], top=cfg.top)
    facts = {"clip": options["clip"], "data": options["data"], "found": found}
    with reserve_files(lambda n: [wanted.with_stem(wanted.stem + n)], overwrite=cfg.overwrite) as [
        out
    ]:
        save_png(page, out, facts)
    rows = [[f"{one['cosine']:.3f}", one["key"], one["caption"]] for one in found]
    return f"{format_columns(['cosine', 'key', 'caption'], rows)}\n{out}"


def sort_pairs_by_value(
    paths: list[Path], texts: list[str], values: list[list[float]]
) -> list[tuple]:
    """Value, picture and text of each pair, a picture's largest value first."""
    found = []
    for path, row in zip(paths, values, strict=True):
        pairs = sorted(zip(row, texts, strict=True), key=lambda pair: -pair[0])
        found += [(value, str(path), text) for value, text in pairs]
    return found


def format_columns(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of words, all but the last of one width."""
    lines = [[escape_control_characters(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    padded = ([*map(str.ljust, line[:-1], widths), line[-1]] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def find_option_images(name: str, value: str) -> list[Path]:
    """A picture's path, or those in a folder, in order of name; UsageError where there is none."""
    path = Path(value)
    if not path.exists():
        raise UsageError(f"{name}={value} does not exist")
    if not path.is_dir():
        return [path]
    found = list_image_files(path)
    if not found:
        raise UsageError(
            f"{name}={value} is a folder without pictures ({', '.join(IMAGE_SUFFIXES)})"
        )
    return found


def read_option_lines(name: str, path: str) -> list[str]:
    """The lines with text of a file; UsageError where there are none."""
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(f"{name}={path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{name}={error}") from error
    return clean_option_list(name, path, text.splitlines())


def read_option_list(name: str, value: str) -> list[str]:
    """The lines of a file, or what stands between commas; UsageError where that is nothing."""
    is_file = value.endswith(".txt") or (len(value) < 256 and Path(value).is_file())
    return (
        read_option_lines(name, value)
        if is_file
        else clean_option_list(name, value, replace_invalid_bytes(value).strip(" []").split(","))
    )


def clean_option_list(name: str, value: str, parts: list[str]) -> list[str]:
    """Each different part once, without blanks around it; UsageError where there is none."""
    found = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise UsageError(f"{name}={value} names nothing: give {name}=a,b,c or a file of lines")
    return found


if __name__ == "__main__":
    main()
