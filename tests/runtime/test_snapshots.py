"""Snapshots are restored exactly; errors on disk are reported, and earlier snapshots survive them."""

import gc
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from iumad_jax.errors import UserError
from iumad_jax.runtime.progress import LedgerMark, Position, Progress
from iumad_jax.runtime.snapshots import Snapshots, read
from iumad_jax.shapes import Calibration, Scale
from tests import sentences


def variables(seed=0, size=3):
    rng = np.random.default_rng(seed)
    return {
        "ib_iumad": {
            "params": {"mamba": {"kernel": rng.normal(size=(2, size)).astype(np.float32)}, "count": np.int32(seed)},
            "statistics": {},
        },
        "floor": {
            "params": {},
            "statistics": {
                "rgb": {"memory": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16), "scale": np.ones(())},
                "by_object": (),
            },
        },
    }


def snapshot(step, updates, finished=False, seed=0, size=3):
    scores = np.array([0.1, 2 / 3], np.float32)
    calibration = Calibration(scores, 2 * scores, np.float32([[1, 2, np.inf], [0, 0.3, np.inf]]), few=True, tiles=6)
    return Progress(
        position=Position(step, updates, finished),
        objects=("bolt", "größe 2", "a/b"),
        variables=variables(seed, size),
        frozen={"cdad": "ab" * 32},
        recognition={"count": np.full(2, 3, np.float32), "mean": np.ones((2, 4), np.float32)},
        scales={"ib_iumad": {"rgb": Scale(*np.float32([[0.1, 2 / 3], [1, 2], [3, 1e-7]]))}},
        calibration={"bolt": calibration, "größe 2": calibration._replace(few=False, from_training_images=True)},
        kept={"bolt": {"arrays": {"trained": "ab"}, "few": True}},
        optimizer=[],
        strategy_state={"old": {"kernel": np.full(2, seed, np.float32)}, "by_object": per_object(seed)},
        losses={"loss": np.arange(updates, dtype=np.float32)} if updates % 2 else {},
        ledger=LedgerMark(10 * step + updates, "ab"),
        seconds=0.3,
        inputs={"camera": None, "processing": {"size": 64}},
    )


def per_object(seed, objects=2):
    """Make arrays of each object, among them half-precision, empty and nested ones."""
    return tuple(
        {"mean": {"rgb": np.full(3, seed + i, np.float16)}, "patches": np.full((i, 4), i, np.float32)}
        for i in range(objects)
    )


@contextmanager
def opened(workdir):
    snapshots = Snapshots(workdir)
    yield snapshots
    snapshots.close()


def assert_same(actual, expected):
    """Compare structure, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        if isinstance(b, np.ndarray | jax.Array | np.generic):
            assert isinstance(a, np.ndarray)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())
        else:
            assert (type(a), a) == (type(b), b)


def test_snapshots_are_restored_exactly(tmp_path):
    """This includes empty branches, scalars, bfloat16 and JAX arrays."""
    optimizer = optax.scale_by_adam().init(variables()["ib_iumad"]["params"]["mamba"])
    saved = snapshot(1, 7)._replace(optimizer=[*jax.tree.leaves(optimizer), jnp.full(2, 0.3, jnp.bfloat16)])
    with opened(tmp_path) as snapshots:
        assert snapshots.latest() is None
        snapshots.save(saved)
        assert_same(snapshots.latest(), saved)
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), saved)


def test_frozen_arrays_are_not_stored(tmp_path):
    """Only their SHA-256 is stored."""
    progress = snapshot(0, 5, finished=True)
    frozen = {
        name: values | {"frozen": {"kernel": np.zeros(10**6, np.float32)}}
        for name, values in progress.variables.items()
    }
    with closing(Snapshots(tmp_path)) as snapshots:
        snapshots.save(progress._replace(variables=frozen))
    restored = read(tmp_path)
    assert restored.frozen == {"cdad": "ab" * 32}
    assert all("frozen" not in values for values in restored.variables.values())
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10**5


def test_the_furthest_position_is_the_latest(tmp_path):
    """The positions are those of a run; the snapshots are reopened after every save."""
    positions = [(0, 1), (0, 3), (0, 0, True), (1, 2), (1, 12), (1, 0, True), (2, 0, True)]
    for seed, position in enumerate(positions):
        with opened(tmp_path) as snapshots:
            snapshots.save(snapshot(*position, seed=seed))
        with opened(tmp_path) as snapshots:
            assert_same(snapshots.latest(), snapshot(*position, seed=seed))
    # All snapshots of finished steps are kept; of those within steps, the two newest.
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["0", "1", "2", "by_object"]
    within = sorted(p.name for p in (tmp_path / "snapshots_within_step").iterdir())
    assert within == ["1000000000002", "1000000000012"]


@pytest.fixture
def after_an_error(monkeypatch):
    """Restore the hooks and log levels that an error leaves silenced, since the tests continue after it."""
    for holder, name in [
        (threading, "excepthook"),
        (sys, "unraisablehook"),
        (logging.getLogger("absl"), "level"),
        (logging.getLogger("asyncio"), "level"),
    ]:
        monkeypatch.setattr(holder, name, getattr(holder, name))
    yield
    gc.collect()
    time.sleep(0.1)


@pytest.mark.usefixtures("after_an_error")
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("room", [0, 10_000])  # too small for any file; too small for the arrays only
def test_a_full_disk_is_reported_and_earlier_snapshots_survive(tmp_path, capfd, files_no_larger_than, room, finished):
    before, after = snapshot(0, 1), snapshot(0, 2, finished, seed=1, size=10_000)
    with opened(tmp_path) as snapshots:
        snapshots.save(before)
        snapshots.wait()
        with files_no_larger_than(room):
            snapshots.save(after)
            with pytest.raises(UserError) as error:
                snapshots.wait()
        folder = tmp_path / ("snapshots" if finished else "snapshots_within_step")
        assert str(error.value) == sentences.SNAPSHOT_NOT_SAVED.format(folder=folder, reason="File too large")
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), before)
        snapshots.save(after)  # the disk has room again
        assert_same(snapshots.latest(), after)
    assert not list(tmp_path.rglob("*unfinished*"))
    assert capfd.readouterr().err == ""


KILLED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from iumad_jax.runtime.progress import BEGINNING, Position
from iumad_jax.runtime.snapshots import Snapshots

snapshots = Snapshots(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # exceeding the file size limit now kills the process
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
snapshots.save(BEGINNING._replace(position=Position(1, 2), variables={"a": {"params": np.random.rand(10_000)}}))
snapshots.wait()
"""


def test_an_incomplete_snapshot_is_removed(tmp_path):
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(1, 1))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert killed.returncode == -signal.SIGXFSZ
    folder = tmp_path / "snapshots_within_step"
    kept, unfinished = sorted(p.name for p in folder.iterdir())
    assert kept == "1000000000001"
    assert unfinished.startswith("1000000000002.")
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), snapshot(1, 1))
        snapshots.save(snapshot(1, 3))
    assert sorted(p.name for p in folder.iterdir()) == ["1000000000001", "1000000000003"]


def test_changes_after_the_start_of_a_save_are_not_saved(tmp_path):
    saved = snapshot(1, 1, size=100_000)
    with opened(tmp_path) as snapshots:
        snapshots.save(saved)
        saved.variables["ib_iumad"]["params"]["mamba"]["kernel"][:] = 0
        saved.calibration["bolt"].score[:] = 0
        saved.strategy_state["by_object"][0]["mean"]["rgb"][:] = 9
        assert_same(snapshots.latest(), snapshot(1, 1, size=100_000))


@pytest.mark.usefixtures("after_an_error")
def test_an_error_in_the_background_is_raised_once_by_the_next_save(tmp_path, files_no_larger_than):
    with opened(tmp_path) as snapshots:
        assert not snapshots.failed
        with files_no_larger_than(0):
            snapshots.save(snapshot(0, 1))
            while not snapshots.failed:
                time.sleep(0.01)
        with pytest.raises(UserError, match=sentences.SNAPSHOT_NOT_SAVED_PART):
            snapshots.save(snapshot(0, 2))
        assert not snapshots.failed


def damages(folder):
    """Damage each file of a snapshot in every way, one after the other, and restore it afterwards."""
    rng = np.random.default_rng(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        if content:
            flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        key = content.replace(b"_timestamp", b"_timestanp", 1)  # still JSON
        for damaged in {content[: len(content) // 2], b"", bytes(flipped), key, content + b"0", None} - {content}:
            file.unlink() if damaged is None else file.write_bytes(damaged)
            yield file
            file.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_snapshot_is_replaced_by_the_one_before(tmp_path, capfd, caplog):
    """Files are removed, truncated, extended or have flipped bits, most of which Orbax restores without an error."""
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True))
        snapshots.save(snapshot(1, 3, seed=1))
        snapshots.save(snapshot(1, 4, seed=2))
    newest, before = (tmp_path / "snapshots_within_step" / f"100000000000{updates}" for updates in (4, 3))
    aside = newest.with_name(f"{newest.name}.damaged1")
    for _ in damages(newest):
        with opened(tmp_path) as snapshots:
            assert_same(snapshots.latest(), snapshot(1, 3, seed=1))
        (message,) = capfd.readouterr().err.splitlines()
        assert re.fullmatch(
            "iumad_jax: " + sentences.SNAPSHOT_SKIPPED.format(snapshot=newest, before=before, aside=aside.name),
            message,
        )
        assert not newest.exists()
        aside.rename(newest)
    for _ in damages(before):  # older snapshots are not read
        with opened(tmp_path) as snapshots:
            assert_same(snapshots.latest(), snapshot(1, 4, seed=2))
    for folder in (newest, before):
        next(damages(folder))
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), snapshot(0, 0, finished=True))
        assert len(capfd.readouterr().err.splitlines()) == 2
        snapshots.save(snapshot(1, 4, seed=3))  # its name is that of a damaged snapshot
        assert_same(snapshots.latest(), snapshot(1, 4, seed=3))
    assert {path.name for path in newest.parent.iterdir()} == {newest.name, f"{before.name}.damaged1", aside.name}
    assert (capfd.readouterr().err, caplog.records) == ("", [])  # Orbax prints and logs nothing


def test_if_all_snapshots_are_damaged_nothing_is_changed(tmp_path):
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True))
        snapshots.save(snapshot(1, 3))
    folders = tmp_path / "snapshots" / "0", tmp_path / "snapshots_within_step" / "1000000000003"
    (file,), _ = ([next(damages(folder))] for folder in folders)
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        with opened(tmp_path) as snapshots, pytest.raises(UserError) as error:
            snapshots.latest()
        message = str(error.value)
        assert message.startswith(sentences.NO_SNAPSHOT_USABLE)
        assert all(f"{folder} " in message for folder in folders)
        assert message.endswith(sentences.NO_SNAPSHOT_USABLE_REMEDY)
        assert sentences.SNAPSHOT_FILE_DIFFERS.format(file.relative_to(folders[0])) in message
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_reading_skips_a_damaged_snapshot_unless_its_step_is_requested(tmp_path, capfd):
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True))
        snapshots.save(snapshot(1, 0, finished=True, seed=1))
    assert_same(read(tmp_path), snapshot(1, 0, finished=True, seed=1))
    assert_same(read(tmp_path, step=0), snapshot(0, 0, finished=True))
    for name, damaged in (("1", "_CHECKPOINT_METADATA"), ("0", "arrays/_METADATA")):
        file = tmp_path / "snapshots" / name / damaged
        file.write_bytes(file.read_bytes().replace(b"kernel", b"kernfl").replace(b"_timestamp", b"_timestanp"))
        with pytest.raises(
            UserError, match=sentences.ONLY_SNAPSHOT_DAMAGED.format(snapshot=f"snapshots/{name}", file=damaged)
        ):
            read(tmp_path, step=int(name))
        if name == "1":
            assert_same(read(tmp_path), snapshot(0, 0, finished=True))
            message = capfd.readouterr().err
            assert message.startswith(f"iumad_jax: {sentences.SNAPSHOT_DAMAGED.format(tmp_path / 'snapshots/1')}")
            assert message.endswith(sentences.SNAPSHOT_USED_INSTEAD.format(tmp_path / "snapshots/0") + "\n")
    with pytest.raises(
        UserError, match=sentences.SNAPSHOTS_ALL_DAMAGED.format(newest="snapshots/1", other="snapshots/0")
    ):
        read(tmp_path)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["0", "1", "by_object"]


def test_a_kill_during_the_first_save_leaves_no_snapshot(tmp_path, monkeypatch):
    """A snapshot without a manifest is incomplete, not damaged: the run starts from the beginning."""

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, opened(tmp_path) as snapshots:
        context.setattr("iumad_jax.runtime.snapshots.write_whole", kill)
        snapshots.save(snapshot(0, 3))
        with pytest.raises(KeyboardInterrupt):
            snapshots.wait()
    assert list((tmp_path / "snapshots_within_step").iterdir())
    with opened(tmp_path) as snapshots:
        assert snapshots.latest() is None
        assert not list((tmp_path / "snapshots_within_step").iterdir())
        snapshots.save(snapshot(0, 3))
        snapshots.save(snapshot(0, 3))  # again at the same position, as after resuming from it
        assert_same(snapshots.latest(), snapshot(0, 3))


def with_objects(step, objects):
    """Make a snapshot of a finished step with large arrays of each object."""
    size = 50_000  # numbers per object
    rng = np.random.default_rng(0)
    strategy = {"by_object": tuple({"mean": rng.normal(size=size).astype(np.float32)} for _ in range(objects))}
    return snapshot(step, 0, finished=True)._replace(strategy_state=strategy)


def test_arrays_of_an_object_are_stored_once(tmp_path):
    with opened(tmp_path) as snapshots:
        for step in range(20):
            snapshots.save(with_objects(step, objects=step + 1))
        snapshots.wait()

    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    folder = tmp_path / "snapshots"
    # Orbax divides what it stores into more or fewer small files, which are hashed, as its threads happen to run.
    first, last = (size(folder / step) - size(folder / step / "arrays") for step in ("1", "19"))
    hashes = 20 * 100
    assert last < first + 20 * 200 + hashes  # 200 bytes for the names of the arrays of an object
    assert size(folder / "19" / "arrays") < 20_000  # a tenth of an array
    assert 20 * 200_000 < size(folder / "by_object") < 20 * 201_000
    assert_same(read(tmp_path, 1), with_objects(1, 2))
    assert_same(read(tmp_path), with_objects(19, 20))


def test_a_damaged_shared_array_damages_only_its_snapshots_and_is_rewritten(tmp_path, capfd):
    with opened(tmp_path) as snapshots:
        for step in range(3):
            snapshots.save(with_objects(step, objects=step + 1))
    by_object = tmp_path / "snapshots" / "by_object"
    newest = max(by_object.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    for damaged in (None, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        newest.unlink() if damaged is None else newest.write_bytes(damaged)
        with pytest.raises(
            UserError,
            match=sentences.SNAPSHOT_ARRAY_DAMAGED.format(snapshot="snapshots/2", file=f"by_object/{newest.name}"),
        ):
            read(tmp_path, 2)
        with opened(tmp_path) as snapshots:
            assert_same(snapshots.latest(), with_objects(1, 2))
            assert sentences.RUN_CONTINUES in capfd.readouterr().err
            snapshots.save(with_objects(2, 3))
            assert_same(snapshots.latest(), with_objects(2, 3))
        assert newest.read_bytes() == content


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    broken = snapshot(1, 0, finished=True)
    broken.recognition["mean"][1, 2] = np.nan
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True))
        with pytest.raises(
            UserError, match=sentences.SNAPSHOT_NOT_FINITE.format(snapshot="snapshots/1", array="recognition/mean")
        ):
            snapshots.save(broken)
        assert_same(snapshots.latest(), snapshot(0, 0, finished=True))


def test_arrays_of_an_object_are_looked_at_once(tmp_path):
    """Their cost would grow with the number of objects: so they are taken to be the same while the array is."""
    first, second = with_objects(0, 2), with_objects(1, 3)
    second.strategy_state["by_object"] = (*first.strategy_state["by_object"], second.strategy_state["by_object"][2])
    with opened(tmp_path) as snapshots:
        snapshots.save(first)
        first.strategy_state["by_object"][0]["mean"][:] = np.nan
        snapshots.save(second)
        assert_same(snapshots.latest(), with_objects(1, 3))
    with opened(tmp_path) as snapshots:
        restored = snapshots.latest()
        restored.strategy_state["by_object"][1]["mean"][:] = np.nan
        snapshots.save(restored._replace(position=Position(2, 0, finished=True)))
        assert_same(snapshots.latest(), with_objects(1, 3)._replace(position=Position(2, 0, finished=True)))
