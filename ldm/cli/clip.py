"""ldm clip image=a.png text="a red star" | data=DIR text=.. | ..; --help has them all."""

import os
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.command_line import FREE_TEXT_OPTIONS, command
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.data.prepare.sources import IMAGE_SUFFIXES, list_image_files
from ldm.utils.errors import UsageError
from ldm.utils.files import read_text, reserve_files, resolve_path
from ldm.utils.output_path import prepare_output_file
from ldm.utils.text import escape_control_characters, format_table, replace_invalid_bytes

REPEATABLE_OPTIONS = ("image", "text")  # may stand several times on the command line
CLIP_TEXT_OPTIONS = (
    *("clip", *REPEATABLE_OPTIONS, "minus", "texts", "data"),
    *("labels", "words", "template", "out"),
)
# The options that each query needs, and those that it takes as well.
CLIP_QUERY_OPTIONS = {
    "difference": (["image", "minus"], ["words", "template", "data"]),
    "label": (["image", "labels"], ["template", "data"]),
    "search": (["data"], ["image", "text", "out"]),
    "recall": (["data"], []),
    "similarity": (["image", "text"], []),
}


def read_repeated_options(words: list[str]) -> dict:
    """Returns the names with a value on the command line, and all values of image= and text=."""
    typed: dict[str, list[str]] = {name: [] for name in CLIP_TEXT_OPTIONS}
    for name, _, value in (word.partition("=") for word in words):
        if name in typed:
            is_text = name in FREE_TEXT_OPTIONS
            typed[name].append(
                replace_invalid_bytes(value) if is_text else os.path.expanduser(value)
            )
    names = {name for name, values in typed.items() if values and values[-1]}
    repeated = {name: [value for value in typed[name] if value] for name in REPEATABLE_OPTIONS}
    return {"names": names, "repeated": repeated}


@command("clip", texts=CLIP_TEXT_OPTIONS, read=read_repeated_options)
def main(cfg: DictConfig, options: dict, *, names: set[str], repeated: dict) -> None:
    """Answers one query and prints the answer."""
    print(answer_query(cfg, options | repeated, choose_query(names)))


def choose_query(names: set[str]) -> str:
    """Returns the query that options of these names make; UsageError where they make none."""
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
    """Returns the lines to print; a search writes an image as well."""
    paths = [path for name in options["image"] or () for path in find_option_images("image", name)]
    others = find_option_images("minus", options["minus"]) if kind == "difference" else []
    texts = list(options["text"] or ())
    if options["texts"]:
        texts += read_option_lines("texts", options["texts"])
    words = read_option_list("words", options["words"]) if options["words"] else None
    labels = read_option_list("labels", options["labels"]) if kind == "label" else []
    templates = read_templates(options["template"])
    if kind == "difference" and len(paths) + len(others) > 2:
        raise UsageError("image=.. and minus=.. are one image each, and no folders")
    if kind == "search" and len(paths) + len(texts) > 1:
        raise UsageError("a search is for one text or one image: give one of them")

    check_checkpoints_and_device(cfg)
    output = prepare_output_file(options["out"], Path("retrieved.png"), moving=False)
    from ldm.evaluation.clip_queries import RECALL_CUTOFFS, ClipQueries  # seconds: torch
    from ldm.utils.images import save_png

    how = {"cache": resolve_path(cfg.cache), "batch": cfg.batch, "device": cfg.device}
    how |= {"data": options["data"], "caption_key": cfg.get("caption_key"), "templates": templates}
    clip = ClipQueries(options["clip"], **how)
    if len(paths) > 1:  # a folder may hold files that are no images
        paths = clip.select_readable(paths) or paths[:1]
    if kind == "similarity":
        rows = sort_pairs_by_value(paths, texts, clip.compute_similarity(paths, texts).tolist())
        rows = [[f"{v:.3f}", f"{100 * max(v, 0):.1f}", *rest] for v, *rest in rows]
        return format_columns(["cosine", "CLIP score", "image", "text"], rows)
    if kind == "label":
        rows = sort_pairs_by_value(paths, labels, clip.classify_labels(paths, labels).tolist())
        rows = [[f"{v:.3f}", *rest] for v, *rest in rows]
        return format_columns(["share", "image", "label"], rows)
    if kind == "difference":
        pairs = clip.find_difference(paths[0], others[0], words, most=cfg.most)[: cfg.top]
        return format_columns(["cosine", "word"], [[f"{v:.3f}", word] for word, v in pairs])
    if kind == "recall":
        recall = clip.compute_recall().items()
        rows = [[*(f"{v:.3f}" for v in shares), way] for way, shares in recall]
        return format_columns([*(f"at {k}" for k in RECALL_CUTOFFS), "from"], rows)
    results, page = clip.search([*paths, *texts][0], top=cfg.top)
    facts = {"clip": options["clip"], "data": options["data"], "found": results}
    files = reserve_files(lambda n: [output.with_stem(output.stem + n)], overwrite=cfg.overwrite)
    with files as [out]:
        save_png(page, out, facts)
    rows = [[f"{one['cosine']:.3f}", one["key"], one["caption"]] for one in results]
    return f"{format_columns(['cosine', 'key', 'caption'], rows)}\n{out}"


def sort_pairs_by_value(
    paths: list[Path], texts: list[str], values: list[list[float]]
) -> list[tuple]:
    """Returns value, image and text of each pair, an image's largest value first."""
    found = []
    for path, row in zip(paths, values, strict=True):
        pairs = sorted(zip(row, texts, strict=True), key=lambda pair: -pair[0])
        found += [(value, str(path), text) for value, text in pairs]
    return found


def format_columns(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a table of words without control characters."""
    cells = [[escape_control_characters(cell) for cell in row] for row in (heads, *rows)]
    return format_table(cells, align="<")


def read_templates(template: str | None) -> list[str]:
    """Returns the lines of a file, or the template itself where it has {}; none for None."""
    if not template:
        return []
    templates = [template] if "{}" in template else read_option_lines("template", template)
    if any("{}" not in line for line in templates):
        raise UsageError(f"template={template} has a line without {{}} for the word")
    return templates


def find_option_images(name: str, value: str) -> list[Path]:
    """Returns an image's path, or those in a folder by name; UsageError where there is none."""
    path = Path(value)
    if not path.exists():
        raise UsageError(f"{name}={value} does not exist")
    if not path.is_dir():
        return [path]
    paths = list_image_files(path)
    if not paths:
        raise UsageError(f"{name}={value} is a folder without images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def read_option_lines(name: str, path: str) -> list[str]:
    """Returns the lines with text of a file; UsageError where there are none."""
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(f"{name}={path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{name}={error}") from error
    return clean_option_list(name, path, text.splitlines())


def read_option_list(name: str, value: str) -> list[str]:
    """Returns the lines of a file, or the parts between commas; UsageError where there are none."""
    if value.endswith(".txt") or (len(value) < 256 and Path(value).is_file()):
        return read_option_lines(name, value)
    return clean_option_list(name, value, replace_invalid_bytes(value).strip(" []").split(","))


def clean_option_list(name: str, value: str, parts: list[str]) -> list[str]:
    """Returns each different part once, stripped; UsageError where there is none."""
    words = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not words:
        raise UsageError(f"{name}={value} names nothing: give {name}=a,b,c or a file of lines")
    return words


if __name__ == "__main__":
    main()
