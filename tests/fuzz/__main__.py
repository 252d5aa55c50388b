"""Feeds every reader of what need not be trusted with damaged and lying inputs.

    python -m tests.fuzz --inputs=10000 [--target=ledger] [--coverage] [--first=N]

An input must lead to a result or to the documented UserError, in one printable sentence, within 5 seconds and 512 MB
(peak of the resident memory beyond what the process had before; address space is bounded to 8 GB more). An input is
made from valid ones by `mutations.mutate`, from its number alone: --first=N --inputs=1 repeats one. With --coverage
atheris chooses, by what code they reach, which inputs are changed further (`pip install atheris`). For Linux.

Every target has a process of its own; one that is killed or hangs is a crash as well, and another goes on behind the
input that it had.
"""

import collections
import faulthandler
import json
import random
import resource
import subprocess
import sys
import tempfile
import zlib
from importlib import import_module
from pathlib import Path

import psutil
from absl import flags
from tabulate import tabulate

HANG, ADDRESSES = 60, 8 << 30  # seconds, bytes

_FLAGS = flags.FlagValues()
flags.DEFINE_string("target", "all", "Which target, by name; or several with commas.", flag_values=_FLAGS)
flags.DEFINE_integer("inputs", 10_000, "How many for each.", flag_values=_FLAGS)
flags.DEFINE_integer("first", 0, "The number of the first.", flag_values=_FLAGS)
flags.DEFINE_bool("coverage", False, "Whether atheris guides.", flag_values=_FLAGS)
flags.DEFINE_string("log", None, "Of a target's own process: where outcomes go.", flag_values=_FLAGS)


def main(arguments: list[str]) -> int:
    """Runs the command; returns 1 if there was a crash."""
    _FLAGS(arguments)
    if _FLAGS.log:
        return work(_FLAGS.target, _FLAGS.first, _FLAGS.inputs, Path(_FLAGS.log), _FLAGS.coverage)
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if _FLAGS.target == "all" else _FLAGS.target.split(",")
    rows, crashes = [], []
    for name in names:
        outcomes = supervise(name, _FLAGS.first, _FLAGS.inputs, _FLAGS.coverage)
        counts = collections.Counter(one["kind"] for one in outcomes)
        crashes += [f"{name}, input {one['number']}: {one['told']}" for one in outcomes if one["kind"] == "crash"]
        slowest, peak = (max(one[key] for one in outcomes) for key in ("seconds", "megabytes"))
        row = [name, len(outcomes), *(counts[kind] for kind in ("refused", "read", "crash"))]
        rows.append([*row, f"{slowest:.2f} s", f"{peak:.0f} MB"])
        print(f"{name}: {dict(counts)}", file=sys.stderr, flush=True)
    headers = ["target", "inputs", "refused with a sentence", "read", "crashes", "slowest", "peak memory"]
    print(tabulate(rows, headers, "github"))
    print("\n".join(crashes[:100]))
    return 1 if crashes else 0


def supervise(name: str, first: int, inputs: int, coverage: bool) -> list[dict]:
    """The outcomes of a target's inputs."""
    outcomes: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        while len(outcomes) < inputs:
            log.write_text("")
            own = [f"--target={name}", f"--first={first + len(outcomes)}", f"--inputs={inputs - len(outcomes)}"]
            command = [sys.executable, "-m", "tests.fuzz", *own, f"--log={log}", f"--coverage={coverage}"]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            new = [json.loads(line) for line in log.read_text().splitlines()]
            outcomes += new
            if len(outcomes) < inputs:
                told = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
                number = first + len(outcomes)
                outcomes.append({"number": number, "kind": "crash", "seconds": 0, "megabytes": 0, "told": told})
                if not new:
                    break
    return outcomes


def work(name: str, first: int, inputs: int, log: Path, coverage: bool) -> int:
    """Feeds one target."""
    if coverage:
        import atheris

        with atheris.instrument_imports(include=["iumad_jax", "PIL", "tifffile", "yaml", "zipfile", "tarfile"]):
            import_module("tests.fuzz.targets")
    from tests.fuzz.mutations import mutate
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import watch

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus, log.open("a") as lines:
        target = TARGETS[name](Path(folder))
        names = list(target.seeds)
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))

        def feed(number: int, seed: str, content: bytes) -> None:
            faulthandler.dump_traceback_later(HANG, exit=True)
            outcome = watch(target, seed, content)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"number": number, **outcome._asdict()}), file=lines, flush=True)

        if not coverage:
            for number in range(first, first + inputs):
                draw = random.Random(zlib.crc32(f"{name} {number}".encode())).randrange
                seed = names[draw(len(names))]
                feed(number, seed, mutate(target.seeds[seed], target.seeds[names[draw(len(names))]], draw))
            return 0

        for i, content in enumerate(target.seeds.values()):  # a byte for the seed's name, then its content
            (Path(corpus) / str(i)).write_bytes(bytes([i]) + content)
        count = iter(range(first, first + inputs))

        def change(data: bytes, most: int, seed: int) -> bytes:
            draw = random.Random(seed).randrange
            which = data[0] if data else 0
            return bytes([which]) + mutate(data[1:], target.seeds[names[draw(len(names))]], draw)[: most - 1]

        def one(data: bytes) -> None:
            number = next(count, None)
            if number is not None:
                feed(number, names[(data[0] if data else 0) % len(names)], data[1:])

        options = [f"-runs={inputs}", "-max_len=100000", "-len_control=0", "-timeout=0", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *options, corpus], one, custom_mutator=change)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
