"""What resizing to the network's square input does to images that are far from square or much larger."""

from collections.abc import Sequence

from iumad_jax.data.prepared.store import Store

_ELONGATED, _LARGE = 2, 4  # ratio of the sides, and longer side over that of the input, above which images are told
_SHARE = 0.001  # of the image: a defect to tell about where none is labelled
_SHOWN = 3  # largest number of sizes to name


def describe_squash(store: Store, objects: Sequence[str]) -> str | None:
    """Describe in one sentence what becomes of the objects' images and of their smallest labelled defect.

    Returns:
        The sentence; None if no training image is more than twice as long as wide, or more than four times as long as
        the input's side. Only otherwise are test images, which tell the defects, prepared if they are not yet.

    Raises:
        UserError: As in `Store.get`.
    """
    side, grid, tiling = store.processing.size, store.settings["grid"], store.processing.tiling
    tall, wide = tiling.share
    sizes = {tuple(image["seen"]) for name in objects for image in store.prepare(name, "train")["images"]}
    tiles = sorted({(round(tall * height), round(wide * width)) for height, width in sizes})
    squashed = [f"{w}x{h}" for h, w in tiles if max(h, w) > min(_ELONGATED * min(h, w), _LARGE * side)]
    if not squashed:
        return None
    tested = [name for name in objects if store.reader.ids(name, "test")]
    areas = [image["mask_area"] for name in tested for image in store.prepare(name, "test")["images"]]
    labelled = [area for area in areas if area]
    share, defect = (min(labelled), "the smallest labelled defect,") if labelled else (_SHARE, "a defect of")
    of_image = f"{100 * share:.2g} % of its image{',' if labelled else ''}"
    kind, tokens = "images" if tiling.count == 1 else "tiles", share / (tall * wide) * grid**2
    more = f" and {len(squashed) - _SHOWN} more sizes" if len(squashed) > _SHOWN else ""
    return (
        f"{kind} of {', '.join(squashed[:_SHOWN])} pixels{more} are resized to {side}x{side}, {grid}x{grid} tokens,"
        f" where {defect} {of_image} becomes {tokens:.2g} tokens; config.input.region cuts out the part that matters,"
        " config.input.tiles divides it, and a larger config.input.size and config.backbone.grid show more of it."
    )
