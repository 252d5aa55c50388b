"""A simulated scan of a scene, and ways to damage its files, shared by the tests of the readers."""

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from iumad_jax.data.sample import Camera, Reader, Sample
from iumad_jax.errors import UserError


class Scene(NamedTuple):
    """Scan of a ball half sunk into a plane, in metres and camera coordinates."""

    rgb: np.ndarray  # (h w 3) uint8
    cloud: np.ndarray  # (h w 3) float32, zero where missing
    mask: np.ndarray  # (h w) uint8, 255 on the ball
    camera: Camera
    normal: np.ndarray  # unit normal n of the plane n . p + distance = 0
    distance: float
    height: np.ndarray  # (h w) exact height above the plane


@pytest.fixture(scope="session")
def scan() -> Callable[..., Scene]:
    """Return a function that simulates a scan: exact intersections with rays, then noise along them and holes."""

    def scan(
        height: int = 48, width: int = 64, tilt: float = 20, noise: float = 2e-4, holes: float = 0.05, seed: int = 0
    ) -> Scene:
        rng = np.random.default_rng(seed)
        camera = Camera(1.2 * width, 1.2 * width, 0.52 * width, 0.47 * height)
        columns, rows = np.meshgrid(np.arange(width), np.arange(height))
        ray = np.stack(
            [(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones((height, width))], axis=-1
        )
        down, sideways, distance, radius = np.radians(tilt), np.radians(25), 0.45, 0.03
        normal = np.array([np.sin(down) * np.sin(sideways), -np.sin(down) * np.cos(sideways), -np.cos(down)])
        plane = -distance / (ray @ normal)
        centre = ray[height // 2, width // 2] * plane[height // 2, width // 2]
        a, b, c = (ray**2).sum(-1), ray @ centre, centre @ centre - radius**2
        ball = np.where(b * b > a * c, (b - np.sqrt(np.maximum(b * b - a * c, 0))) / a, np.inf)
        z = np.minimum(plane, ball)
        exact = (ray * z[..., None]) @ normal + distance
        z = z + noise * rng.standard_normal(z.shape)
        z[rng.random(z.shape) < holes] = 0
        rgb = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        mask = np.where(ball < plane, 255, 0).astype(np.uint8)
        return Scene(rgb, (ray * z[..., None]).astype(np.float32), mask, camera, normal, distance, exact)

    return scan


@pytest.fixture(scope="session")
def read_all() -> Callable[[Reader], list[Sample]]:
    """Return a function that reads every sample of a reader."""

    def read_all(reader: Reader) -> list[Sample]:
        samples = []
        for name, split in itertools.product(reader.objects, ("train", "calibration", "test", "unlabelled")):
            samples += [reader.read(name, split, id_) for id_ in reader.ids(name, split)]
        return samples

    return read_all


@pytest.fixture(scope="session")
def refused(read_all: Callable[[Reader], list[Sample]]) -> Callable[[Callable[[], Reader], str, str], None]:
    """Return an assertion that a dataset is refused in one sentence, which contains a name and the expected reason."""

    def refused(open_: Callable[[], Reader], named: str, expected: str) -> None:
        with pytest.raises(UserError) as error:
            read_all(open_())
        message = str(error.value)
        assert named in message, message
        assert expected in message, message
        assert message.endswith(".")
        assert "\n" not in message
        assert ". " not in message

    return refused


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], Iterable[tuple]]:
    """Return a function that lists paths, sizes and times of everything in a folder."""

    def tree(root: Path) -> list[tuple]:
        return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*"))

    return tree


class Spoil:
    """Kinds of damage to a file or folder."""

    @staticmethod
    def apply(damage: Callable[[Path], None] | str | tuple, path: Path) -> None:
        """Damage a path by a function, by the name of one of these methods, or by (name, *arguments)."""
        if isinstance(damage, tuple):
            damage = getattr(Spoil, damage[0])(*damage[1:])
        elif isinstance(damage, str):
            damage = getattr(Spoil, damage)
        damage(path)

    @staticmethod
    def write(content: bytes | str) -> Callable[[Path], None]:
        return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode()) and None

    @staticmethod
    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    @staticmethod
    def fold(file: Path) -> None:
        """Replace a file by a folder."""
        file.unlink()
        file.mkdir()

    @staticmethod
    def loop(path: Path) -> None:
        """Replace a file or folder by a link to itself."""
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(path.name)

    @staticmethod
    def move_out(path: Path) -> None:
        """Move a file or folder out of the folder "dataset" and link to it."""
        root = next(parent for parent in path.parents if parent.name == "dataset")
        target = root.parent / f"outside {path.name}"
        shutil.move(path, target)
        path.symlink_to(target)

    @staticmethod
    def copy_to(name: str) -> Callable[[Path], None]:
        return lambda file: shutil.copy(file, file.with_name(name)) and None

    @staticmethod
    def replace(name: str, content: bytes) -> Callable[[Path], None]:
        """Replace a file by another one with this name and content."""
        return lambda file: file.rename(file.with_name(name)).write_bytes(content) and None

    @staticmethod
    def rename_to(name: str) -> Callable[[Path], None]:
        return lambda path: path.rename(path.with_name(name)) and None

    rmtree, unlink = staticmethod(shutil.rmtree), staticmethod(Path.unlink)

    @staticmethod
    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.fixture(scope="session")
def spoil() -> type[Spoil]:
    return Spoil
