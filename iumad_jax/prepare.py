"""Prepares a dataset before its first run: python -m iumad_jax.prepare --config=configs/mvtec3d.py.

Every image of every object and split is read, processed and encoded once; a run does the same with what it needs and
finds what is there. Prints what the dataset holds and draws a contact sheet of every object.
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _prepare, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_string(
        "archive", None, "A .tar, .tar.gz, .tar.xz or .zip to unpack into dataset.root first.", flag_values=values
    )
    flags.DEFINE_float("archive_gb", 100, "How large it may become, GB.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("archive_entries", 10**6, "How many files it may hold.", lower_bound=1, flag_values=values)


def _prepare(values: flags.FlagValues) -> str:
    config, workdir = cli.given_config(values)
    from iumad_jax import config as configs  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.data import readers
    from iumad_jax.data.formats import archives
    from iumad_jax.data.prepared.store import open_store
    from iumad_jax.data.prepared.survey import survey

    configs.check(config)
    if values.archive:
        root, limits = Path(config.dataset.root), archives.Limits(int(values.archive_gb * 1e9), values.archive_entries)
        print(f"{values.archive}: SHA-256 {archives.unpack(Path(values.archive), root, limits)}, unpacked to {root}")
    readers.render(config)
    store = open_store(config, readers.open_reader(config), workdir)
    sheets = store.folder / "contact_sheets"
    return f"{survey(store, sheets)}\nContact sheets are in {sheets}."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
