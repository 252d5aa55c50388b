"""Feed damaged and forged inputs to every reader of untrusted data.

    python -m tests.fuzz --inputs=100

Every input must lead to a result or to the documented UserError, in one printable sentence, within 5 seconds and 512 MB
(peak of the additional resident memory; the address space may grow by 8 GB). `mutations.mutated` makes an input from
valid ones and its number alone, so --first=N --inputs=1 repeats it. With --coverage, atheris chooses the inputs to
mutate further by the code that they reach (`pip install atheris`). Linux only.

Every target runs in a separate process. A process that is killed or hangs counts as a crash, too, and a new process
continues with the next input.
"""

import collections
import faulthandler
import json
import random
import resource
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import psutil
from absl import flags
from tabulate import tabulate

HANG, EXTRA_ADDRESS_SPACE = 60, 8 << 30  # seconds, bytes


def main(arguments: list[str]) -> int:
    """Run the command; return 1 if any input crashed."""
    if "--help" in arguments:
        from iumad_jax import cli  # not at the top: atheris instruments the package before its import

        return cli.execute(str(__doc__), arguments, _define, lambda _: "")
    values = flags.FlagValues()
    _define(values)
    values(arguments)
    if values.log:
        return work(values.target, values.first, values.inputs, Path(values.log), values.coverage)
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if values.target == "all" else values.target.split(",")
    rows, crashes = [], []
    for name in names:
        outcomes = supervise(name, values.first, values.inputs, values.coverage)
        counts = collections.Counter(outcome["kind"] for outcome in outcomes)
        for outcome in outcomes:
            if outcome["kind"] == "crash":
                crashes.append(f"{name}, input {outcome['number']}: {outcome['message']}")
        slowest, peak = (max(outcome[key] for outcome in outcomes) for key in ("seconds", "megabytes"))
        row = [name, len(outcomes), *(counts[kind] for kind in ("refused", "read", "crash"))]
        rows.append([*row, f"{slowest:.2f} s", f"{peak:.0f} MB"])
        print(f"{name}: {dict(counts)}", file=sys.stderr, flush=True)
    headers = ["target", "inputs", "refused with a sentence", "read", "crashes", "slowest", "peak memory"]
    print(tabulate(rows, headers, "github"))
    print("\n".join(crashes[:100]))
    return 1 if crashes else 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", "all", "Names of targets, separated by commas, or all.", flag_values=values)
    flags.DEFINE_integer("inputs", 10_000, "Number of inputs per target.", flag_values=values)
    flags.DEFINE_integer("first", 0, "Number of the first input.", flag_values=values)
    flags.DEFINE_bool("coverage", False, "Choose inputs by code coverage, with atheris.", flag_values=values)
    flags.DEFINE_string("log", None, "File for the outcomes; set in the process of a target.", flag_values=values)


def supervise(name: str, first: int, inputs: int, coverage: bool) -> list[dict]:
    """Feed a target in child processes and return the outcomes of all inputs."""
    outcomes: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        while len(outcomes) < inputs:
            log.write_text("")
            options = [f"--target={name}", f"--first={first + len(outcomes)}", f"--inputs={inputs - len(outcomes)}"]
            command = [sys.executable, "-m", "tests.fuzz", *options, f"--log={log}", f"--coverage={coverage}"]
            process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            new_outcomes = [json.loads(line) for line in log.read_text().splitlines()]
            outcomes += new_outcomes
            if len(outcomes) < inputs:
                message = f"the process ended with {process.returncode}: {process.stderr[-2000:]}"
                number = first + len(outcomes)
                outcomes.append({"number": number, "kind": "crash", "seconds": 0, "megabytes": 0, "message": message})
                if not new_outcomes:
                    break
    return outcomes


def work(name: str, first: int, inputs: int, log: Path, coverage: bool) -> int:
    """Feed one target in this process."""
    if coverage:
        import atheris

        with atheris.instrument_imports(include=["iumad_jax", "PIL", "tifffile", "yaml", "zipfile", "tarfile"]):
            import_module("tests.fuzz.targets")
    from tests.fuzz.mutations import mutate, mutated
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import watch

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus, log.open("a") as lines:
        target = TARGETS[name](Path(folder))
        names = list(target.seeds)
        limit = psutil.Process().memory_info().vms + EXTRA_ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        def feed(number: int, seed: str, content: bytes) -> None:
            faulthandler.dump_traceback_later(HANG, exit=True)
            outcome = watch(target, seed, content)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"number": number, **outcome._asdict()}), file=lines, flush=True)

        if not coverage:
            for number in range(first, first + inputs):
                feed(number, *mutated(name, target.seeds, number))
            return 0

        for i, content in enumerate(target.seeds.values()):  # one byte for the index of the seed, then its content
            (Path(corpus) / str(i)).write_bytes(bytes([i]) + content)
        numbers = iter(range(first, first + inputs))

        def mutate_data(data: bytes, max_size: int, seed: int) -> bytes:
            draw = random.Random(seed).randrange
            index = data[0] if data else 0
            return bytes([index]) + mutate(data[1:], target.seeds[names[draw(len(names))]], draw)[: max_size - 1]

        def feed_data(data: bytes) -> None:
            number = next(numbers, None)
            if number is not None:
                feed(number, names[(data[0] if data else 0) % len(names)], data[1:])

        options = [f"-runs={inputs}", "-max_len=100000", "-len_control=0", "-timeout=0", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *options, corpus], feed_data, custom_mutator=mutate_data)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
