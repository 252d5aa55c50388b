"""One file per layout of a dataset; `open_reader` makes the reader that a config names."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from iumad_jax.data import candies
from iumad_jax.data.formats.files import select
from iumad_jax.data.readers import eyecandies, mvtec3d
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.readers.folder import Folder, object_names
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError


def objects(config: ConfigDict) -> tuple[str, ...]:
    """The objects that `config.dataset` chooses, known before anything is rendered or read.

    Raises:
        UserError: there is no such dataset or object.
    """
    return select(config.dataset.objects, available(config))


def available(config: ConfigDict) -> tuple[str, ...]:
    """All objects of the dataset, chosen or not.

    Raises:
        UserError: there is no such dataset.
    """
    dataset, readers = config.dataset, _readers(config, "all")
    if dataset.name not in readers:
        raise UserError(f'config.dataset.name is "{dataset.name}"; use one of {", ".join(readers)}.')
    fixed = {"eyecandies": eyecandies.OBJECTS, "candies": eyecandies.OBJECTS, "mvtec3d": mvtec3d.OBJECTS}
    return fixed.get(dataset.name) or object_names(Path(dataset.root))


def render(config: ConfigDict) -> None:
    """Renders what is missing of candies; other datasets have to be there.

    Raises:
        UserError: there is no such object, or they cannot be written.
    """
    if config.dataset.name == "candies":
        objects(config)  # an unknown name is told before anything is rendered
        candies.render(Path(config.dataset.root), **config.dataset.render)


def open_reader(config: ConfigDict, chosen: Sequence[str] | None = None) -> Reader:
    """The reader of a whole config, which reads what its inputs need.

    Args:
        config: of a run.
        chosen: the objects that it reads, in the order of learning; by default those that the config names.

    Raises:
        UserError: there is no such dataset, or its files are at fault.
    """
    dataset = config.dataset
    if chosen is None:
        objects(config)  # an unknown name is told first
    official = "depth" in config.modality and config.input.depth_encoding == "normals_official"
    if official and dataset.name not in ("eyecandies", "candies"):
        raise UserError(f'config.input.depth_encoding is "normals_official", which {dataset.name} lacks; use normals.')
    return _readers(config, dataset.objects if chosen is None else chosen)[dataset.name]()


def _readers(config: ConfigDict, chosen: str | Sequence[str]) -> dict[str, Callable[[], Reader]]:
    root, light = Path(config.dataset.root), config.dataset.light
    depth = "depth" in config.modality
    normals = depth and config.input.depth_encoding == "normals_official"
    return {
        "eyecandies": lambda: Eyecandies(root, chosen, light, normals),
        "candies": lambda: Eyecandies(root, chosen, light, normals),
        "mvtec3d": lambda: MVTec3D(root, chosen, config.dataset.validation, depth),
        "folder": lambda: Folder(root, chosen, depth),
    }
