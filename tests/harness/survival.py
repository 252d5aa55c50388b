"""Interrupt runs at random moments and check that they end like an uninterrupted run.

    python -m tests.harness.survival --config=survival --kills=5

A reference run of the config is not interrupted. Then other runs, each in a separate folder, meet faults at random
moments and are resumed until they finish. The faults are: SIGKILL; SIGTERM or SIGINT; SIGKILL and a damaged file in the
newest snapshot; a full disk. A fault is survived exactly if the process reacts to it as documented and the run that met
it ends with the ledger, the snapshots of all steps, the pictures and the results of the reference run, byte by byte
except for the run time.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax import cli
from iumad_jax.errors import INTERRUPTED, UserError

KILL, PREEMPT, DAMAGE, FULL = "SIGKILL", "SIGTERM or SIGINT", "SIGKILL, file damaged", "full disk"
_TIMEOUT = 600.0  # seconds until a process counts as hanging
_STOP_TIMEOUT = 10.0  # seconds within which a process must end after SIGTERM or SIGINT


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _survive)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string(
        "workdir", "runs/survival", "Folder of the runs; those that do not survive are kept.", flag_values=values
    )
    for name, default, help_ in (
        ("kills", 100, f"Number of faults of the kind: {KILL}."),
        ("preemptions", 0, f"Number of faults of the kind: {PREEMPT}."),
        ("damages", 0, f"Number of faults of the kind: {DAMAGE}."),
        ("full_disks", 0, f"Number of faults of the kind: {FULL}."),
        ("seed", 0, "Seed of the random kinds and moments."),
    ):
        flags.DEFINE_integer(name, default, help_, lower_bound=0, flag_values=values)


def _survive(values: flags.FlagValues) -> str:
    """Run all trials and return the table of faults."""
    config, _ = cli.config_and_workdir(values)
    home, rng = Path(values.workdir).absolute(), np.random.default_rng(values.seed)
    config.dataset.root = str(Path(config.dataset.root).absolute())
    os.environ |= {  # inherited by the processes, which would otherwise spend most of their time compiling
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONWARNINGS": "ignore:resource_tracker",  # about semaphores of killed processes
    }
    start, reference = time.monotonic(), Trial(home / "reference", config)
    if reference.end(reference.start()) != 0:
        raise UserError(f"the uninterrupted run fails: {reference.output}")
    pace = Pace(time.monotonic() - start, reference.lines())

    remaining = {KILL: values.kills, PREEMPT: values.preemptions, DAMAGE: values.damages, FULL: values.full_disks}
    tried: Counter[tuple[str, str]] = Counter()
    survived: Counter[tuple[str, str]] = Counter()
    failed: list[str] = []
    with tqdm(total=sum(remaining.values()), unit="fault", disable=None) as bar:
        while sum(remaining.values()):
            trial = Trial(home / f"trial{len(failed)}", config)
            while trial.meet(remaining, rng, pace):
                bar.update()
            trial.problems += trial.unreported() + _differences(trial.workdir, reference.workdir)
            tried.update(trial.faults)
            print(f"{tried.total()} faults, {len(failed) + bool(trial.problems)} failed runs", file=sys.stderr)
            if trial.problems:
                failed.append(f"{trial.folder}: {', '.join(trial.problems)}")
            else:
                survived.update(trial.faults)
                shutil.rmtree(trial.folder)
    rows = [[*fault, tried[fault], survived[fault]] for fault in sorted(tried)]
    table = tabulate(rows, ["fault", "while", "tried", "survived exactly"], "pipe")
    if failed:
        print(table)
        raise UserError(f"{len(failed)} runs did not survive; {'; '.join(failed)}.")
    return table


class Pace:
    """Duration of an uninterrupted run, and its number of lines in live.jsonl."""

    def __init__(self, seconds: float, lines: int) -> None:
        self.seconds, self.lines = seconds, lines


class Trial:
    """A run in a separate folder, on which one process after the other works."""

    def __init__(self, folder: Path, config: ConfigDict) -> None:
        """Create the folder empty; an earlier trial in it is deleted."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.workdir, self.config = folder, folder / "run", config
        self.output = ""  # output of the last process
        self.outputs = ""  # output of all processes
        self.damaged: list[Path] = []  # folders of damaged snapshots
        self.faults: list[tuple[str, str]] = []  # kind of the fault, activity of the run
        self.problems: list[str] = []

    def start(self) -> BaseProcess:
        """Start a process that resumes the run."""
        context = multiprocessing.get_context("forkserver")  # imports the slow modules once for all processes
        context.set_forkserver_preload(["iumad_jax.experiment"])
        process = context.Process(target=_work, args=(self.folder, self.config))
        process.start()
        return process

    def end(self, process: BaseProcess) -> int | None:
        """Wait for a process, keep its output and return its exit code."""
        process.join(_TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            self.problems.append("a process hung")
        file = self.folder / "output"
        self.output = file.read_text() if file.exists() else ""
        self.outputs += self.output
        if "Traceback" in self.output:
            self.problems.append(f"a process printed: {self.output}")
        return process.exitcode

    def lines(self) -> int:
        """Return the number of lines in live.jsonl, a measure of progress."""
        return len(_lines(self.workdir / "live.jsonl"))

    def meet(self, remaining: dict[str, int], rng: np.random.Generator, pace: Pace) -> bool:
        """Start a process and inject a fault, if any remains. Return False when the process ended by itself."""
        kinds = [kind for kind in remaining for _ in range(remaining[kind])]
        before, process = self.lines(), self.start()
        if kinds:
            fault, target = rng.choice(kinds), before + int(rng.exponential(pace.lines / 6))
            while process.is_alive() and self.lines() < target:
                time.sleep(0.002)
            process.join(rng.uniform(0, pace.seconds / (3 if target == before else pace.lines)))
        if not kinds or not process.is_alive():
            if (code := self.end(process)) != 0:
                self.problems.append(f"a process ended with exit code {code}: {self.output}")
            return False
        _INJECT[fault](self, process, rng)
        self.faults.append((fault, self._activity(before)))
        remaining[fault] -= 1
        return True

    def _activity(self, before: int) -> str:
        """Name what the last process was doing; live.jsonl had `before` lines when it started."""
        events = _lines(self.workdir / "ledger.jsonl")
        if self.lines() == before or not events:
            return "preparing or starting"
        if json.loads(events[-1])["event"] not in ("step", "epoch"):
            return "evaluating or reporting"
        snapshots = [path for path in self.workdir.glob("snapshots*/*") if path.is_dir() and "damaged" not in path.name]
        saved = all((snapshot / "sha256.json").exists() for snapshot in snapshots)
        return "training" if saved else "training, inside a save"

    def unreported(self) -> list[str]:
        """Describe the damage that no process reported."""
        folders = [folder for folder in self.damaged if str(folder) not in self.outputs]
        return [f"{folder} was damaged, which no process reported" for folder in folders]


def _work(folder: Path, config: ConfigDict) -> None:
    """Run the config in a process of a trial, with stdout and stderr written to a file."""
    os.chdir(folder)
    with Path("output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from iumad_jax import experiment

    def act(_: flags.FlagValues) -> str:
        results = experiment.run(config, Path("run"))
        assert results is not None  # this is process 0
        return str(results["seconds"])

    sys.exit(cli.execute("", ["run"], lambda _: None, act, resumable=True))


def _lines(file: Path) -> list[bytes]:
    """Read the complete lines of a file."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def _kill(trial: Trial, process: BaseProcess, _: np.random.Generator) -> None:
    process.kill()
    trial.end(process)


def _preempt(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    start = time.monotonic()
    assert process.pid is not None
    os.kill(process.pid, int(rng.choice([signal.SIGTERM, signal.SIGINT])))
    code, seconds = trial.end(process), time.monotonic() - start
    if seconds > _STOP_TIMEOUT:
        trial.problems.append(f"a process took {seconds:.1f} s to stop")
    if code not in (INTERRUPTED, 0):  # 0: the run was finished before the signal
        trial.problems.append(f"after a signal to stop, a process ended with exit code {code}: {trial.output}")


def _damage(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    """Kill the process and damage a file of the newest snapshot, if an older snapshot exists."""
    _kill(trial, process, rng)
    manifests = sorted(trial.workdir.glob("snapshots*/*[0-9]/sha256.json"), key=lambda file: file.stat().st_mtime_ns)
    manifests = [file for file in manifests if ".damaged" not in file.parent.name]
    if len(manifests) < 2 or trial.unreported() or (trial.workdir / "results.json").exists():
        return
    folder = manifests[-1].parent
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    match rng.integers(4):
        case 0:
            file.unlink()
        case 1 if content:
            file.write_bytes(content[: len(content) // 2])
        case 2 if content:
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            file.write_bytes(content)
        case _:
            file.write_bytes(content + b"\0")
    trial.damaged.append(folder)


def _fill(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    """Emulate a full disk: from now on no file of the process can grow beyond a random size."""
    size = int(2 ** rng.uniform(12, 18))
    assert process.pid is not None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    code = trial.end(process)
    if code not in (2, 0) or (code == 2 and not trial.output.splitlines()[-1].startswith("iumad_jax: ")):
        trial.problems.append(f"with a full disk, a process ended with exit code {code}: {trial.output}")


_INJECT = {KILL: _kill, PREEMPT: _preempt, DAMAGE: _damage, FULL: _fill}


def _differences(workdir: Path, reference: Path) -> list[str]:
    """Describe the differences between two runs."""
    try:
        results, expected = _contents(workdir), _contents(reference)
    except (OSError, UserError) as error:
        return [str(error)]
    return [f"{name} differs" for name in sorted(results | expected) if results.get(name) != expected.get(name)]


def _contents(workdir: Path) -> dict[str, Any]:
    """Return all outputs of a run except its run time, by name."""
    import jax

    from iumad_jax.runtime import snapshots

    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    contents = {"results.json": results, "ledger.jsonl": (workdir / "ledger.jsonl").read_bytes()}
    contents |= {file.name: file.read_bytes() for file in (workdir / "pictures").iterdir()}
    for step in range(len(results["steps"])):
        progress = snapshots.read(workdir, step)
        contents[f"snapshot {step}"] = [
            (path, leaf.dtype, leaf.tobytes()) if isinstance(leaf, np.ndarray) else (path, leaf)
            for path, leaf in jax.tree.leaves_with_path(progress._replace(seconds=0.0))
        ]
    return contents


if __name__ == "__main__":
    sys.exit(main(sys.argv))
