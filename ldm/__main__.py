"""ldm VERB ...: every command of ldm/cli under one name; `ldm` alone lists them."""

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run the command that the first word names."""
    verbs = sorted(p.stem for p in Path(__file__).parent.glob("cli/*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(f"ldm: give one of {', '.join(verbs)}")
    import_module(f"ldm.cli.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    main()
