"""Render the candies dataset: RGB-D images of ten sweets, or of procedural ones; half of the test images have defects.

python -m iumad_jax.data.candies --root=runs/candies
"""

import argparse
import sys
from typing import NoReturn

from iumad_jax.data.candies.dataset import render
from iumad_jax.errors import USER_ERROR, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def main() -> None:
    """Parse the flags and render the dataset; report a user's mistake in one sentence."""
    summary, example = str(__doc__).strip().split("\n\n")
    parser = _Parser(usage=example.strip(), description=summary, allow_abbrev=False)
    parser.add_argument("--root", required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--train", type=int, default=24, help="good training samples per object (default: %(default)s)")
    parser.add_argument("--val", type=int, default=4, help="good validation samples per object (default: %(default)s)")
    parser.add_argument(
        "--test", type=int, default=16, help="test samples per object, half of them with defects (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument(
        "--version",
        type=int,
        default=1,
        help="version of the renderer: 1, or 2, where RGB hardly shows bumps and dents (default: %(default)s)",
    )
    parser.add_argument(
        "--lamp",
        type=float,
        default=0.0,
        help="0, or up to 1 for lamps that are warmer, dimmer and at another side (default: %(default)s)",
    )
    parser.add_argument(
        "--objects",
        default="all",
        help="all of the ten sweets, names separated by commas, or a number N of procedural sweets, sweet_001 to"
        " sweet_N (default: %(default)s)",
    )
    try:
        root = render(**vars(parser.parse_args()))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(USER_ERROR)
    print(f"candies: {root}")


if __name__ == "__main__":
    main()
