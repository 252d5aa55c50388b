"""Dataset readers, one module per layout; `open_reader` creates the reader that a config selects."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from iumad_jax.data import candies
from iumad_jax.data.formats.files import select, trusted
from iumad_jax.data.readers import eyecandies
from iumad_jax.data.readers.arrangements import object_folders
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError


def objects(config: ConfigDict) -> tuple[str, ...]:
    """Return the objects that `config.dataset` selects, without rendering or reading images.

    Raises:
        UserError: If the dataset or an object is unknown.
    """
    return select(config.dataset.objects, available(config))


def available(config: ConfigDict) -> tuple[str, ...]:
    """List all objects of the dataset, selected or not.

    Raises:
        UserError: If the dataset is unknown.
    """
    dataset, readers = config.dataset, _readers(config, "all")
    if dataset.name not in readers:
        raise UserError(f'config.dataset.name is "{dataset.name}"; use one of {", ".join(readers)}.')
    fixed: dict[str, tuple[str, ...]] = {
        "eyecandies": eyecandies.OBJECTS,
        "candies": eyecandies.OBJECTS,
        "sweets": candies.names(dataset.render.objects),
    }
    return fixed.get(dataset.name) or tuple(object_folders(Path(dataset.root), trusted(dataset.trust)))


def render(config: ConfigDict) -> None:
    """Render the missing images of candies and sweets; other datasets must exist already.

    Raises:
        UserError: If an object is unknown or the images cannot be written.
    """
    if config.dataset.name in ("candies", "sweets"):
        objects(config)  # raises for an unknown name before anything is rendered
        kind = {"objects": "all"} if config.dataset.name == "candies" else {}
        candies.render(Path(config.dataset.root), **{**config.dataset.render, **kind})


def open_reader(config: ConfigDict, chosen: Sequence[str] | None = None) -> Reader:
    """Create the reader of a config's dataset, which reads depth and normals if the model's inputs need them.

    Args:
        config: Config of a run.
        chosen: Objects to read, in the order of learning; by default those that the config selects.

    Raises:
        UserError: If the dataset or an object is unknown, or files are missing or unusable.
    """
    dataset = config.dataset
    if chosen is None:
        objects(config)  # raises for an unknown name before any other check
    official = "depth" in config.modality and config.input.depth_encoding == "normals_official"
    if official and dataset.name not in ("eyecandies", "candies", "sweets"):
        raise UserError(f'config.input.depth_encoding is "normals_official", which {dataset.name} lacks; use normals.')
    return _readers(config, dataset.objects if chosen is None else chosen)[dataset.name]()


def _readers(config: ConfigDict, chosen: str | Sequence[str]) -> dict[str, Callable[[], Reader]]:
    root, light, trust = Path(config.dataset.root), config.dataset.light, trusted(config.dataset.trust)
    depth = "depth" in config.modality
    normals = depth and config.input.depth_encoding == "normals_official"
    return {
        "eyecandies": lambda: Eyecandies(root, chosen, light, normals, trusted=trust),
        "candies": lambda: Eyecandies(root, chosen, light, normals, trusted=trust),
        "sweets": lambda: Eyecandies(
            root, chosen, light, normals, candies.names(config.dataset.render.objects), trusted=trust
        ),
        "mvtec3d": lambda: MVTec3D(root, chosen, config.dataset.validation, depth, trust),
        "folder": lambda: Folder(root, chosen, depth, "rgb" in config.modality, trust),
    }
