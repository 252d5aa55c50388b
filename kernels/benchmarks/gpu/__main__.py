"""Everything that only a GPU can tell: python -m kernels.benchmarks.gpu --minutes=9 --out=FOLDER [--data=FOLDER].

Parts, in the order of their worth, each in a process of its own with its share of the time:

    a correctness   the kernels against the definition in float64
    b scan          times of the selective scan, and shares of the floor
    c update        an update of configs/eyecandies.py: ms, share of peak, memory
    d profile       its five hottest kernels
    e training      as many epochs at the paper's sizes as fit, with the table of results
    f prediction    a trained model on 1 and on 16 images

Each writes FOLDER/PART.json after every row. The same command once more does what is missing or failed. Exit codes: 0
all is done; 1 something is missing, told in a sentence for each part; 2 a mistake.
"""

import argparse
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from iumad_jax.data.readers.eyecandies import OBJECTS
from kernels.benchmarks.gpu import scheduler
from kernels.benchmarks.gpu.scheduler import Part
from kernels.benchmarks.gpu.worker import Options

_SHARES = {"correctness": 120, "scan": 120, "update": 120, "profile": 50, "training": 130, "prediction": 40}
PARTS = {name: Part(f"kernels.benchmarks.gpu.{name}", share) for name, share in _SHARES.items()}
_LETTERS = dict(zip("abcdef", PARTS, strict=True))


def _parts(text: str) -> dict[str, Part]:
    """Names or letters, separated by commas."""
    names = [_LETTERS.get(name, name) for name in text.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; use a to f, or {', '.join(PARTS)}")
    return {name: PARTS[name] for name in PARTS if name in names}


def _minutes(text: str) -> float:
    """A positive number."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give minutes above 0")
    return minutes


def _dataset(text: str) -> str:
    """A folder in the format of Eyecandies."""
    if not any((Path(text) / name).is_dir() for name in OBJECTS):
        raise argparse.ArgumentTypeError(f"{text!r} holds no object of Eyecandies; give a folder with CandyCane, ...")
    return str(Path(text).resolve())


def main(arguments: list[str] | None = None, parts: dict[str, Part] = PARTS) -> int:
    """Runs the parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--data", type=_dataset, help="Eyecandies to train on; without it candies are rendered")
    parser.add_argument("--parts", type=_parts, default=parts, help="names or letters with commas between")
    parser.add_argument("--rehearse", action="store_true", help="all of it at tiny sizes on the CPU")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part's process ends, too
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(str(given.out.resolve()), scratch, given.data, given.rehearse, 60 * given.minutes)
        try:
            given.out.mkdir(parents=True, exist_ok=True)
            missing = scheduler.run(given.parts, options)
        except scheduler.NoGPU:
            with suppress(OSError):  # of results that are there
                given.out.rmdir()
            print("JAX finds no GPU here; run this where it does, or add --rehearse.", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"--out={given.out} cannot be written ({error.strerror}); choose another folder.", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"--out: {error}", file=sys.stderr)
            return 2
    if missing:
        print("Missing, and done by the same command once more:", *missing.values(), sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
