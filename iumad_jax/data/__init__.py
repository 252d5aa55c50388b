"""Readers, depth processing and the input pipeline."""

from pathlib import Path

from ml_collections import ConfigDict

from iumad_jax.data import candies, eyecandies, mvtec3d
from iumad_jax.data.eyecandies import Eyecandies
from iumad_jax.data.files import select
from iumad_jax.data.folder import Folder, object_names
from iumad_jax.data.mvtec3d import MVTec3D
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError


def objects(config: ConfigDict) -> tuple[str, ...]:
    """The objects that `config.dataset` chooses, known before anything is rendered or read.

    Raises:
        UserError: there is no such dataset or object.
    """
    known: tuple[str, ...]
    match config.dataset.name:
        case "eyecandies" | "candies":
            known = eyecandies.OBJECTS
        case "mvtec3d":
            known = mvtec3d.OBJECTS
        case "folder":
            known = object_names(Path(config.dataset.root))
        case name:
            raise UserError(f'config.dataset.name is "{name}"; use eyecandies, candies, mvtec3d or folder.')
    return select(config.dataset.objects, known)


def open_reader(config: ConfigDict) -> Reader:
    """The reader of a whole config, which reads what its inputs need; candies are rendered first where missing.

    Raises:
        UserError: there is no such dataset, or its files are at fault.
    """
    dataset, root = config.dataset, Path(config.dataset.root)
    objects(config)  # an unknown name is told before anything is rendered
    needs_depth = "depth" in config.modality
    normals = needs_depth and config.input.depth_encoding == "normals_official"
    if normals and dataset.name not in ("eyecandies", "candies"):
        raise UserError(f'config.input.depth_encoding is "normals_official", which {dataset.name} lacks; use normals.')
    match dataset.name:
        case "mvtec3d":
            return MVTec3D(root, dataset.objects, dataset.validation, needs_depth)
        case "folder":
            return Folder(root, dataset.objects, needs_depth)
        case "candies":
            candies.render(root, **dataset.render)
    return Eyecandies(root, dataset.objects, dataset.light, normals)
