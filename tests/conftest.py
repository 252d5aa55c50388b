"""Settings and fixtures shared by all tests."""

import gc
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# With 2 cores and jax <= 0.11, updates on emulated devices deadlock unless this is set before jax is imported.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's new fusion emitters take most of the time to compile for CPUs; versions without this option ignore it. Workers
# have one core, so that dividing a program into parts to compile them at a time takes time only.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1",
)
# Every worker uses a single core: small models train no faster on two cores, and much slower on shared ones.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

import tests.shape_checks  # the hook imports it by name

install_import_hook(["iumad_jax", "iumad_kernels"], f"{tests.shape_checks.__name__}.checked")
jax.config.update("jax_num_cpu_devices", 4)
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # commands that tests start neither read nor fill the user's folder
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50)  # tracing makes so many objects that the default takes a tenth of the tests' time


def pytest_collection_modifyitems(items):
    """Run the slow tests first, so that no worker is idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def eyecandies_root() -> Path:
    """Return the folder of the real Eyecandies samples, which is next to the repository."""
    root = Path(__file__).parents[2] / "shared" / "data" / "eyecandies"
    if not (root / "CandyCane").is_dir():
        pytest.skip("the real Eyecandies samples are not at ../shared/data/eyecandies")
    return root


@pytest.fixture(scope="session")
def files_no_larger_than() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context manager that emulates a full disk: files of this process cannot exceed a size in bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """Return a folder that all workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def compiled(shared) -> Path:
    """Return the folder of the shared compilation cache. Most tests compile the same small model."""
    return shared / "compiled"


@pytest.fixture(scope="session")
def candies(shared) -> Callable[..., Path]:
    """Return a function that fills a folder with the first small candies of objects, which are rendered only once."""
    from iumad_jax.data.candies import render  # after the hook is installed

    def fill(root: Path, objects: str, *, train: int, val: int, test: int) -> Path:
        for name in objects.split(","):
            rendered = shared / "candies" / name
            rendered.parent.mkdir(exist_ok=True)
            with FileLock(f"{rendered}.lock"):
                render(rendered, train=8, val=3, test=4, size=64, objects=name, progress=False)
            for split, count in {"train": train, "val": val, "test_public": test}.items():
                (root / name / split / "data").mkdir(parents=True)
                for file in (rendered / name / split / "data").iterdir():
                    if int(file.name.partition("_")[0]) < count:
                        shutil.copy2(file, root / file.relative_to(rendered))
        return root

    return fill


@pytest.fixture(scope="session")
def quick_settings(compiled) -> dict[str, object]:
    """Return settings of JAX that compile without optimisation and with the shared compilation cache."""
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }


@pytest.fixture(scope="module")
def compile_quickly(quick_settings):
    """Compile without optimisation and with the shared compilation cache."""
    before = {name: jax.config.values[name] for name in quick_settings}
    for name, value in quick_settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def processes_compile_quickly(quick_settings):
    """Let the processes that tests start compile like `compile_quickly`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_settings.items():
            patch.setenv(name.upper(), str(value))
        yield
