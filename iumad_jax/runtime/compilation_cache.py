"""Folder of compiled programs, which saves later commands the time to compile them (JAX's persistent cache).

Only this module knows the folder, and it does not import JAX: JAX reads the settings when it is imported. JAX keeps
programs of different sources, versions and options apart; programs of other processors are in another folder.
"""

import hashlib
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import platformdirs

from iumad_jax.errors import UserError

OFF = "off"
MAXIMUM_BYTES = 2 * 2**30  # beyond it, JAX deletes the least recently used programs
SECONDS_TO_WRITE = 60  # within which another process may still be writing a program
_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def enable(folder: str | None) -> None:
    """Let JAX, which must not be imported yet, store compiled programs in a folder.

    A process that has already imported JAX keeps its settings, as does one with the environment variable
    JAX_COMPILATION_CACHE_DIR.

    Args:
        folder: Folder of the programs; None means one in the user's cache folder, "off" none at all.

    Raises:
        UserError: If the named folder cannot be created.
    """
    if folder == OFF:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if "jax" in sys.modules or (folder is None and _FOLDER in os.environ):
        return
    path = Path(folder or platformdirs.user_cache_path("iumad_jax")) / f"jaxlib-{version('jaxlib')}-{_processor()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _remove_incomplete(path)
    except OSError as error:
        if folder is None:
            return  # without a home folder that can be written, every command compiles
        raise UserError(
            f"--compilation_cache={folder} cannot be written: {error.strerror}; name another folder or {OFF}."
        ) from error
    os.environ[_FOLDER] = str(path)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAXIMUM_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _remove_incomplete(folder: Path) -> None:
    """Remove programs whose writing was interrupted: JAX writes PROGRAM-atime after PROGRAM-cache.

    Raises:
        OSError: If the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass
    for suffix, other in (("cache", "atime"), ("atime", "cache")):
        for path in folder.glob(f"*-{suffix}"):
            partner = path.with_name(path.name.removesuffix(suffix) + other)
            if not partner.exists() and time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                path.unlink(missing_ok=True)


def _processor() -> str:
    """Return a hash of the processor's instruction sets: programs contain instructions that others may lack."""
    features = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        features += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(features.encode()).hexdigest()[:12]
