"""Measure correctness, speed and memory of the kernels, of training and of prediction on a GPU, in one command.

    python -m kernels.benchmarks.gpu --minutes=9 --out=gpu_results

The parts run in order of importance, each in a separate process with its share of the time:

    a correctness   errors of the kernels relative to the definition in float64
    b scan          times of the selective scan, and shares of the floor (a lower bound)
    c update        time, share of peak rate and memory of an update of configs/eyecandies.py
    d profile       the five kernels of that update that take most time
    e training      training at the paper's sizes for as many epochs as fit, with its results
    f prediction    time of a trained model on 1 and on 16 images
    g methods       time of an update and of a prediction of every trained method, in the small configs' sizes

Each part writes FOLDER/PART.json after every row. Run the same command again to complete missing or failed rows. Exit
codes: 0 if everything is done; 1 if something is missing, with a sentence for each part; 2 for invalid arguments.
"""

import argparse
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from iumad_jax.data.readers.eyecandies import OBJECTS
from kernels.benchmarks import command_line
from kernels.benchmarks.gpu import scheduler
from kernels.benchmarks.gpu.scheduler import Part
from kernels.benchmarks.gpu.worker import Options

_SHARES = {"correctness": 100, "scan": 100, "update": 150, "profile": 60}
_SHARES |= {"training": 130, "prediction": 40, "methods": 80}
PARTS = {name: Part(f"kernels.benchmarks.gpu.{name}", share) for name, share in _SHARES.items()}
_LETTERS = dict(zip("abcdefg", PARTS, strict=True))


def _parse_parts(text: str) -> dict[str, Part]:
    """Parse names or letters of parts, separated by commas."""
    names = [_LETTERS.get(name, name) for name in text.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a part; choose a to g, or {', '.join(PARTS)}")
    return {name: PARTS[name] for name in PARTS if name in names}


def _parse_minutes(text: str) -> float:
    """Parse a positive number."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; choose a number of minutes above 0")
    return minutes


def _parse_dataset(text: str) -> str:
    """Check that a folder has the format of Eyecandies and return its absolute path."""
    if not any((Path(text) / name).is_dir() for name in OBJECTS):
        message = f"{text!r} contains no object of Eyecandies; choose a folder that contains CandyCane, for example"
        raise argparse.ArgumentTypeError(message)
    return str(Path(text).resolve())


def main(arguments: list[str] | None = None, parts: dict[str, Part] = PARTS) -> int:
    """Run the parts and return the exit code."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--minutes", type=_parse_minutes, default=9.0, help="Time for all parts together, in minutes; the default is 9."
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder of the results; required.")
    parser.add_argument(
        "--data", type=_parse_dataset, help="Folder of Eyecandies to train on; by default, candies are rendered."
    )
    parser.add_argument(
        "--parts",
        type=_parse_parts,
        default=parts,
        help="Names or letters of parts, separated by commas; all by default.",
    )
    parser.add_argument("--rehearse", action="store_true", help="Run all parts at tiny sizes on the CPU.")
    flags = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the process of a part ends too
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(str(flags.out.resolve()), scratch, flags.data, flags.rehearse, 60 * flags.minutes)
        try:
            flags.out.mkdir(parents=True, exist_ok=True)
            missing = scheduler.run(flags.parts, options)
        except scheduler.NoGPU:
            with suppress(OSError):  # the folder may contain results
                flags.out.rmdir()
            print("JAX finds no GPU; run this command on a machine with a GPU, or add --rehearse.", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"--out={flags.out} cannot be written ({error.strerror}); choose another folder.", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"--out: {error}", file=sys.stderr)
            return 2
    if missing:
        print(
            "Some parts are incomplete; run the same command again to complete them:",
            *missing.values(),
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
