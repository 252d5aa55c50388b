"""A few damaged inputs for every target, and regressions found by fuzzing; `python -m tests.fuzz` tries thousands."""

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import watch
from tests.models import pth, test_malformed_pickles

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_input_is_read_or_refused_in_a_sentence(tmp_path, name):
    target = TARGETS[name](tmp_path)
    for number in range(15):
        outcome = watch(target, *mutated(name, target.seeds, number))
        assert outcome.kind != "crash", (number, outcome)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"layout"}))  # whose inputs are sequences of changes
def test_unchanged_seeds_are_read(tmp_path, name):
    """Otherwise a mutated seed would be refused for the seed's own mistake."""
    target = TARGETS[name](tmp_path)
    for seed, content in target.seeds.items():
        outcome = watch(target, seed, content)
        assert outcome.kind == "read", (seed, outcome)


BOMB = b"a0: &a0 {k: v}\n" + b"".join(
    b"a%d: &a%d {<<: [%s]}\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)
)
CLOUD = b"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 2\nHEIGHT 2\nPOINTS 4\n"
REGRESSIONS = {
    "deeply nested JSON: ledger": ("ledger", "ledger.jsonl", b"[" * 100_000 + b"\n"),
    "deeply nested JSON: config": ("workdir", "config.json", b"[" * 100_000),
    "deeply nested JSON: results": ("workdir", "results.json", b"[" * 100_000),
    "another config": ("workdir", "config.json", b"{}"),
    "other results": ("workdir", "results.json", b'{"config": {"method": 3}}'),
    "an unterminated NumPy header": ("workdir", "samples/step0_bolt.npz", b"\x93NUMPY\x01\0\x08\0{'descr'"),
    "control characters": ("depth", "11.pcd", CLOUD + b"DATA \x1b[2J\n"),
    "a TIFF with only its header": ("images", "rgb.tiff", b"II*\0\x08\0\0\0"),
    "a huge WebP": ("images", "lossy.webp", b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xfe" * 6),
    "a number above the largest float": ("folder", "dataset.yaml", b"unit: " + b"9" * 400),
    "a number too long to print": ("folder", "dataset.yaml", b"normals_window: 1" + b":1" * 3000),
    "a bomb of aliases": ("folder", "dataset.yaml", BOMB),
    "a key of a thousand parts": ("config", "0", b"--config." + b"a." * 3000 + b"b=1"),
    "an endless flag": ("config", "0", b"--config.seed=" + b"9x" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize(("name", "seed", "content"), REGRESSIONS.values(), ids=REGRESSIONS)
def test_earlier_crashes_are_refused(tmp_path, name, seed, content):
    target = TARGETS[name](tmp_path)
    assert seed in target.seeds
    outcome = watch(target, seed, content)
    assert outcome.kind == "refused", outcome


@pytest.mark.parametrize("name", test_malformed_pickles.MALFORMED)
@pytest.mark.parametrize("write", [pth.zipped, pth.legacy])
def test_malformed_pickles_are_refused_in_time(tmp_path, write, name):
    content, _ = test_malformed_pickles.MALFORMED[name]
    outcome = watch(TARGETS["weights"](tmp_path), "x.pth", write(pth.HEAD + content, {}))
    assert outcome.kind == "refused", outcome


def test_a_prepared_array_with_an_unterminated_header_is_prepared_again(tmp_path):
    target = TARGETS["store"](tmp_path)
    seed = next(name for name in target.seeds if name.endswith("images_rgb.npy"))
    damaged = target.seeds[seed].replace(b"(", b"[", 1).replace(b"}", b" ")
    assert watch(target, seed, damaged).kind == "read"
