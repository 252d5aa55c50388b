"""The folder of compiled programs: chosen before JAX is imported, harmless when damaged or foreign."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iumad_jax.errors import UserError
from iumad_jax.runtime import compilation_cache
from tests import sentences

PROGRAM = """
import sys, time
from iumad_jax.runtime import compilation_cache
compilation_cache.enable(eval(sys.argv[1]))
import jax, jax.numpy as jnp
@jax.jit
def program(x):
    for i in range(60):
        x = jnp.sin(x) @ x + i
    return x
import jax.monitoring
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(program(jnp.eye(8))[0, 0]), sum("cache_hits" in event for event in events))
"""


def run(folder, home, **environment):
    """Run the program in a process of its own; return its result, its number of cache hits, and its stderr."""
    environment = (
        {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
        | {
            "XDG_CACHE_HOME": str(home),
            "JAX_PLATFORMS": "cpu",
        }
        | environment
    )
    command = [sys.executable, "-c", PROGRAM, repr(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result, hits = done.stdout.split()
    return result, int(hits), done.stderr


def without_jax(monkeypatch):
    """Emulate a process that has not imported JAX, with an environment of its own."""
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "jax"})
    monkeypatch.setattr(os, "environ", {})


def programs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-cache") if path.is_file()]


def test_a_second_process_reads_what_the_first_one_compiled(tmp_path):
    first, hits_before, _ = run(None, tmp_path)
    second, hits_after, _ = run(None, tmp_path)
    assert (hits_before, first) == (0, second)
    assert hits_after > 0
    assert all(path.is_relative_to(tmp_path / "iumad_jax") for path in programs(tmp_path))


def test_a_damaged_program_is_compiled_again(tmp_path):
    expected, _, _ = run(str(tmp_path), tmp_path)
    for path in programs(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    result, hits, _ = run(str(tmp_path), tmp_path)
    assert (result, hits) == (expected, 0)


@pytest.mark.parametrize("lost", ["cache", "atime"])
def test_a_program_whose_writing_was_killed_is_replaced(tmp_path, lost):
    """JAX writes two files per program, and by itself neither replaces nor completes a single one."""
    run(str(tmp_path), tmp_path)
    for path in tmp_path.rglob("*-*"):
        if path.name.endswith(f"-{lost}"):
            path.unlink()
        elif path.is_file():
            path.write_bytes(b"")
            os.utime(path, (0, 0))
    assert run(str(tmp_path), tmp_path)[1] == 0
    _, hits, stderr = run(str(tmp_path), tmp_path)
    assert hits > 0
    assert "Error" not in stderr


def test_off_writes_nothing(tmp_path):
    assert run("off", tmp_path)[1] == 0
    assert not programs(tmp_path)


def test_a_folder_in_the_environment_is_kept(tmp_path):
    all_programs = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # whatever the speed of the machine
    run(None, tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), **all_programs)
    assert programs(tmp_path / "mine")
    assert not programs(tmp_path / "home")


def test_processors_have_folders_of_their_own(tmp_path, monkeypatch):
    without_jax(monkeypatch)
    folders = set()
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(compilation_cache.platform, "machine", lambda machine=machine: machine)
        compilation_cache.enable(str(tmp_path))
        folders.add(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert len(folders) == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    without_jax(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentences.COMPILATION_CACHE_UNWRITABLE.format(folder=tmp_path / "file")):
        compilation_cache.enable(str(tmp_path / "file"))


def test_a_process_with_jax_keeps_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    compilation_cache.enable(str(tmp_path))
    assert not os.environ
