"""Stops a run again and again and looks whether it ends the same: python -m tests.harness.survival --config=FILE.

A run of the config is let alone once. Then runs of it, each in a folder of its own, meet faults at random moments and
are started again until they end by themselves. The faults: SIGKILL; SIGTERM or SIGINT; SIGKILL and a spoiled file in
the newest snapshot; a disk that is full from some moment on. A fault is survived exactly if the process answers it as
it should and the run that met it ends with the ledger, the snapshots of all steps, the pictures and the results of the
run that was let alone, byte by byte but for the time taken.
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

KILL, PREEMPT, DAMAGE, FULL = "SIGKILL", "SIGTERM or SIGINT", "SIGKILL, a file spoiled", "full disk"
_LONGEST = 600.0  # seconds that a process may take
_SOON = 10.0  # seconds in which it must end when asked to


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _survive)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string("workdir", "runs/survival", "Where runs that do not survive are kept.", flag_values=values)
    for name, default, help_ in (
        ("kills", 100, f"How many faults: {KILL}."),
        ("preemptions", 0, f"How many: {PREEMPT}."),
        ("damages", 0, f"How many: {DAMAGE}."),
        ("full_disks", 0, f"How many: {FULL}."),
        ("seed", 0, "Of the moments."),
    ):
        flags.DEFINE_integer(name, default, help_, lower_bound=0, flag_values=values)


def _survive(values: flags.FlagValues) -> str:
    """The table of all faults."""
    config, _ = cli.given_config(values)
    home, rng = Path(values.workdir).absolute(), np.random.default_rng(values.seed)
    config.dataset.root = str(Path(config.dataset.root).absolute())
    os.environ |= {  # of the processes, which would mostly compile
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONWARNINGS": "ignore:resource_tracker",  # of semaphores that killed processes leave
    }
    began, alone = time.monotonic(), Trial(home / "alone", config)
    if alone.end(alone.start()) != 0:
        raise UserError(f"a run that nothing interrupts fails: {alone.said}")
    pace = Pace(time.monotonic() - began, alone.lines())

    left = {KILL: values.kills, PREEMPT: values.preemptions, DAMAGE: values.damages, FULL: values.full_disks}
    tried: Counter[tuple[str, str]] = Counter()
    survived: Counter[tuple[str, str]] = Counter()
    failed: list[str] = []
    with tqdm(total=sum(left.values()), unit="fault", disable=None) as bar:
        while sum(left.values()):
            trial = Trial(home / f"trial{len(failed)}", config)
            while trial.meet(left, rng, pace):
                bar.update()
            trial.wrong += trial.unsaid() + _differences(trial.workdir, alone.workdir)
            tried.update(trial.faults)
            print(f"{tried.total()} faults, {len(failed) + bool(trial.wrong)} runs that differ", file=sys.stderr)
            if trial.wrong:
                failed.append(f"{trial.folder}: {', '.join(trial.wrong)}")
            else:
                survived.update(trial.faults)
                shutil.rmtree(trial.folder)
    rows = [[*fault, tried[fault], survived[fault]] for fault in sorted(tried)]
    table = tabulate(rows, ["fault", "while", "tried", "survived exactly"], "pipe")
    if failed:
        print(table)
        raise UserError(f"not all was survived; {'; '.join(failed)}.")
    return table


class Pace:
    """How long a run takes that nothing interrupts, and how many lines of live.jsonl."""

    def __init__(self, seconds: float, lines: int) -> None:
        self.seconds, self.lines = seconds, lines


class Trial:
    """A run in a folder of its own, and the processes that work on it one after the other."""

    def __init__(self, folder: Path, config: ConfigDict) -> None:
        """Of an earlier trial nothing is left in the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.workdir, self.config = folder, folder / "run", config
        self.said = ""  # by the last process
        self.all_said = ""
        self.spoiled: list[Path] = []
        self.faults: list[tuple[str, str]] = []  # which, and when
        self.wrong: list[str] = []

    def start(self) -> BaseProcess:
        """A process that goes on with it."""
        context = multiprocessing.get_context("forkserver")  # which imports once for all what takes long
        context.set_forkserver_preload(["iumad_jax.experiment"])
        process = context.Process(target=_live, args=(self.folder, self.config))
        process.start()
        return process

    def end(self, process: BaseProcess) -> int | None:
        """Its exit code."""
        process.join(_LONGEST)
        if process.exitcode is None:
            process.kill()
            process.join()
            self.wrong.append("a process hung")
        file = self.folder / "said"
        self.said = file.read_text() if file.exists() else ""
        self.all_said += self.said
        if "Traceback" in self.said:
            self.wrong.append(f"a process said: {self.said}")
        return process.exitcode

    def lines(self) -> int:
        """How far it is, by all that was ever told."""
        return len(_lines(self.workdir / "live.jsonl"))

    def meet(self, left: dict[str, int], rng: np.random.Generator, pace: Pace) -> bool:
        """Starts a process and lets it meet a fault, if any is left; False when it ended by itself."""
        kinds = [kind for kind in left for _ in range(left[kind])]
        before, process = self.lines(), self.start()
        if kinds:
            fault, wanted = rng.choice(kinds), before + int(rng.exponential(pace.lines / 6))
            while process.is_alive() and self.lines() < wanted:
                time.sleep(0.002)
            process.join(rng.uniform(0, pace.seconds / (3 if wanted == before else pace.lines)))
        if not kinds or not process.is_alive():
            if (code := self.end(process)) != 0:
                self.wrong.append(f"it ended with code {code}: {self.said}")
            return False
        _STRIKES[fault](self, process, rng)
        self.faults.append((fault, self._moment(before)))
        left[fault] -= 1
        return True

    def _moment(self, before: int) -> str:
        """What the last process was at, which began when there were so many lines."""
        told = _lines(self.workdir / "ledger.jsonl")
        if self.lines() == before or not told:
            return "preparing or starting"
        if json.loads(told[-1])["event"] not in ("step", "epoch"):
            return "evaluating or reporting"
        there = [one for one in self.workdir.glob("snapshots*/*") if one.is_dir() and "damaged" not in one.name]
        return "training" if all((one / "sha256.json").exists() for one in there) else "training, inside a save"

    def unsaid(self) -> list[str]:
        """Damage that no process told."""
        return [
            f"{folder} was spoiled and nobody said so" for folder in self.spoiled if str(folder) not in self.all_said
        ]


def _live(folder: Path, config: ConfigDict) -> None:
    """The whole life of a process."""
    os.chdir(folder)
    with Path("said").open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    from iumad_jax import experiment

    def act(_: flags.FlagValues) -> str:
        results = experiment.run(config, Path("run"))
        assert results is not None  # as in the first of several processes
        return str(results["seconds"])

    sys.exit(cli.execute("", ["run"], lambda _: None, act, resumable=True))


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def _kill(trial: Trial, process: BaseProcess, _: np.random.Generator) -> None:
    process.kill()
    trial.end(process)


def _preempt(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    asked = time.monotonic()
    assert process.pid is not None
    os.kill(process.pid, int(rng.choice([signal.SIGTERM, signal.SIGINT])))
    code, took = trial.end(process), time.monotonic() - asked
    if took > _SOON:
        trial.wrong.append(f"it took {took:.1f} s to stop")
    if code not in (INTERRUPTED, 0):  # 0: nothing was left to do
        trial.wrong.append(f"asked to stop, it ended with code {code}: {trial.said}")


def _damage(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    """One file of the newest snapshot, if there is another one to fall back on."""
    _kill(trial, process, rng)
    manifests = sorted(trial.workdir.glob("snapshots*/*[0-9]/sha256.json"), key=lambda file: file.stat().st_mtime_ns)
    manifests = [file for file in manifests if ".damaged" not in file.parent.name]
    if len(manifests) < 2 or trial.unsaid() or (trial.workdir / "results.json").exists():
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
    trial.spoiled.append(folder)


def _fill(trial: Trial, process: BaseProcess, rng: np.random.Generator) -> None:
    """From now on no file of the process grows beyond a size."""
    size = int(2 ** rng.uniform(12, 18))
    assert process.pid is not None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    code = trial.end(process)
    if code not in (2, 0) or (code == 2 and not trial.said.splitlines()[-1].startswith("iumad_jax: ")):
        trial.wrong.append(f"with a full disk, it ended with code {code}: {trial.said}")


_STRIKES = {KILL: _kill, PREEMPT: _preempt, DAMAGE: _damage, FULL: _fill}


def _differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two runs."""
    try:
        a, b = _kept(one), _kept(other)
    except (OSError, UserError) as error:
        return [str(error)]
    return [f"{name} differs" for name in sorted(a | b) if a.get(name) != b.get(name)]


def _kept(workdir: Path) -> dict[str, Any]:
    """All that a run leaves but the time it took, by name."""
    import jax

    from iumad_jax.runtime import snapshots

    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    kept = {"results.json": results, "ledger.jsonl": (workdir / "ledger.jsonl").read_bytes()}
    kept |= {file.name: file.read_bytes() for file in (workdir / "pictures").iterdir()}
    for step in range(len(results["steps"])):
        progress = snapshots.read(workdir, step)
        kept[f"snapshot {step}"] = [
            (path, leaf.dtype, leaf.tobytes()) if isinstance(leaf, np.ndarray) else (path, leaf)
            for path, leaf in jax.tree.leaves_with_path(progress._replace(seconds=0.0))
        ]
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv))
