"""Draws docs/pictures/rooms.png: the rooms of ldm/ and the imports between them.

    python benchmarks/draw_rooms.py

An arrow points from a room to a room that it imports. Arrows that follow from others are left out.
"""

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
ROOMS = {  # room: (x and y of its box, its contents)
    "cli": (0.50, 6, "one file for each command"),
    "config": (0.50, 5, "configuration to objects; what a file may build"),
    "training": (0.50, 4, "Lightning modules, callbacks, EMA, loggers"),
    "experiments": (0.74, 3, "run directories, sweeps, rankings"),
    "inference": (0.20, 2, "the pipeline: prompts to images"),
    "evaluation": (0.74, 2, "metrics, features, the protocol"),
    "models": (0.50, 1, "UNet, autoencoder, CLIP, text"),
    "data": (0.84, 1, "shards, exact order, captions"),
    "diffusion": (0.27, 0, "schedules, samplers, guidance, tasks"),
    "utils": (0.73, 0, "files, checkpoints, images, locks"),
}


def read_imports() -> dict[str, set[str]]:
    """The rooms that each room imports, read from the syntax trees."""
    imports: dict[str, set[str]] = {room: set() for room in ROOMS}
    for room in ROOMS:
        for path in (ROOT / "ldm" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm"):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                rooms = {name.split(".")[1] for name in names if name.startswith("ldm.")}
                imports[room] |= rooms & ROOMS.keys() - {room}
    return imports


def find_reachable(room: str, imports: dict[str, set[str]]) -> set[str]:
    """The rooms that a room imports, by itself or through others."""
    return imports[room].union(*(find_reachable(other, imports) for other in imports[room]))


def main() -> None:
    imports = read_imports()
    figure, axes = plt.subplots(figsize=(9, 7), dpi=110)
    for room, (x, y, contents) in ROOMS.items():
        style = {"boxstyle": "round,pad=0.55", "facecolor": "#eef3fa", "edgecolor": "#35517a"}
        text = f"$\\bf{{{room}}}$\n{contents}"
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=style, zorder=3)
        through = set().union(*(find_reachable(other, imports) for other in imports[room]))
        for other in imports[room] - through:
            end = (ROOMS[other][0], ROOMS[other][1] + 0.33)
            arrow = {"arrowstyle": "-|>", "color": "#35517a", "linewidth": 1.1}
            axes.annotate("", xy=end, xytext=(x, y - 0.29), arrowprops=arrow, zorder=2)
    axes.set(xlim=(0, 1), ylim=(-0.5, 6.5))
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "pictures" / "rooms.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
