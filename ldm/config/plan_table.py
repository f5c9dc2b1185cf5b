"""The numbers of `plan=true` as a text."""

from collections.abc import Mapping

GIB, GB = 2**30, 10**9
PlanTable = dict[str, dict[str, object]]  # numbers by name, in tables by title


def format_plan(name: str, table: PlanTable, utilisation: float) -> str:
    """The tables in words, with units, without what is 0."""
    lines = [f"the plan of runs/{name}, from shapes alone; nothing was run or written"]
    for title, rows in table.items():
        unit = next((each for each in ("FLOPs", "memory", "disk", "cache") if each in title), title)
        lines += ["", {"hours": f"hours, at {utilisation:.0%} of the peak"}.get(title, title)]
        lines += [
            f"  {row:<42} {format_amount(unit, value, rows)}"
            for row, value in rows.items()
            if value != 0
        ]
    return "\n".join(lines)


def format_amount(unit: str, value: object, rows: Mapping[str, object]) -> str:
    """A number of a table with its unit."""
    if value is None:
        return "not known: the shards are not here"
    if isinstance(value, str):
        return f"{value:>16}"
    if unit == "parameters":
        return f"{value / 1e6:>16,.2f} M"
    if unit == "FLOPs":
        return f"{value / 1e12:>16,.3f} T {value / rows['all']:>8.1%}"
    if unit == "memory":
        return f"{value / GIB:>16,.2f} GiB"
    if unit in ("disk", "cache"):
        small = abs(value) < GB / 10
        return f"{value / 1e3:>16,.1f} kB" if small else f"{value / GB:>16,.2f} GB"
    return f"{value:>16,}"
