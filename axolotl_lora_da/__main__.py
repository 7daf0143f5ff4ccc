"""`python -m axolotl_lora_da --check config.yml`: faults in the rows that Axolotl itself prepares for a config.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_da.errors import LoraDAError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if the rows were looked at, 1 after a sentence that says why not."""
    parser = argparse.ArgumentParser(
        "python -m axolotl_lora_da",
        description="Look for faults in the data of an Axolotl config: rows that train nothing, repeat others, are cut "
        "off, or whose loss stands out. Nothing is trained.",
    )
    parser.add_argument("--check", required=True, type=Path, metavar="CONFIG", help="the config, a YAML file")
    parser.add_argument(
        "--output", type=Path, help="folder for lora_da_check.json and .png (default: the config's output_dir)"
    )
    asked = parser.parse_args(arguments)
    try:
        if not asked.check.is_file():
            raise LoraDAError(f"there is no config {asked.check}")
        try:
            from axolotl_lora_da.check import check_config
        except ImportError as error:
            raise LoraDAError(f"to check a config of Axolotl's, install it beside lora-da: {error}") from error
        for line in check_config(asked.check, asked.output):
            print(line)
    except LoraDAError as error:
        print(f"lora_da: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
