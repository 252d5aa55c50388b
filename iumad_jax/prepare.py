"""Prepare a dataset: read, process and encode all images, print a summary and draw contact sheets.

    python -m iumad_jax.prepare --config=quickstart

Optional: a run prepares the images it needs and reuses those already prepared. Suspicious images are reported as by a
run: black ones, duplicates, or training images among those for validation or tests.
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import tell_once


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _prepare, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_string(
        "archive", None, "A .tar, .tar.gz, .tar.xz or .zip file to unpack into dataset.root first.", flag_values=values
    )
    flags.DEFINE_float(
        "archive_gb", 100, "Largest size of the unpacked archive, GB.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "archive_entries",
        10**6,
        "Largest number of files and folders in the archive.",
        lower_bound=1,
        flag_values=values,
    )


def _prepare(values: flags.FlagValues) -> str:
    config, workdir = cli.config_and_workdir(values)
    from iumad_jax import config as configs
    from iumad_jax.data import readers  # loads JAX, so wrong flags are reported first
    from iumad_jax.data.formats import archives
    from iumad_jax.data.prepared.good_images import suspicious_images
    from iumad_jax.data.prepared.squash import describe_squash
    from iumad_jax.data.prepared.store import open_store
    from iumad_jax.data.prepared.survey import survey
    from iumad_jax.runtime import live

    configs.check(config)
    if values.archive:
        root, limits = Path(config.dataset.root), archives.Limits(int(values.archive_gb * 1e9), values.archive_entries)
        print(f"{values.archive}: SHA-256 {archives.unpack(Path(values.archive), root, limits)}, unpacked to {root}")
    readers.render(config)
    store = open_store(config, readers.open_reader(config), workdir)
    sheets = store.folder / "contact_sheets"
    table = survey(store, sheets)
    for name in store.reader.objects:
        for message in suspicious_images(store, name):
            live.log(message)
    if warning := describe_squash(store, store.reader.objects):
        tell_once(("squash", store.folder), warning)
    return f"{table}\nContact sheets are in {sheets}."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
