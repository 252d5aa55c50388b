"""The ledger: equal events give equal bytes, and a crash leaves complete lines only."""

import hashlib
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.errors import UserError
from iumad_jax.runtime.ledger import SHA256_OF_NOTHING, Ledger, read
from iumad_jax.runtime.storage import write_whole
from tests import sentences


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_a_ledger_is_one_json_object_per_line(path):
    ledger = Ledger(path)
    ledger.append("step", step=0, learned=("a", "b"))
    ledger.append(
        "epoch", loss=np.float32(0.1), curve=jnp.array([1.0, jnp.nan, -jnp.inf]), norms={"z": 1e400, "a": -0.0}
    )
    assert path.read_text() == (
        '{"event": "step", "step": 0, "learned": ["a", "b"]}\n'
        '{"event": "epoch", "loss": 0.10000000149011612, "curve": [1.0, null, null], "norms": {"z": null, "a": -0.0}}\n'
    )
    assert len(ledger) == len(read(path)) == 2


@pytest.mark.parametrize("value", [np.int64(3), np.bool_(True), np.array(7), jnp.int32(3), np.arange(4).reshape(2, 2)])
def test_numpy_and_jax_values_are_written_as_numbers(path, value):
    Ledger(path).append("x", value=value)
    assert read(path)[0]["value"] == value.tolist()


def test_bfloat16_is_written_as_its_exact_value(path):
    Ledger(path).append("x", value=jnp.bfloat16(0.1), nan=jnp.bfloat16(math.nan))
    assert read(path) == [{"event": "x", "value": 0.10009765625, "nan": None}]


def test_values_without_json_form_are_refused_before_writing(path):
    ledger = Ledger(path)
    with pytest.raises(TypeError, match="set"):
        ledger.append("x", value={1, 2})
    assert path.read_bytes() == b""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)), st.text())
def test_values_read_back_exactly(tmp_path_factory, floats, text):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    Ledger(path).append("x", floats=floats, text=text)
    (event,) = read(path)
    assert [struct.pack("d", value) for value in event["floats"]] == [struct.pack("d", value) for value in floats]
    assert event["text"] == text


def test_a_reopened_ledger_is_continued(path):
    Ledger(path).append("a")
    ledger = Ledger(path)
    ledger.append("b")
    assert len(ledger) == 2
    assert [event["event"] for event in read(path)] == ["a", "b"]


@pytest.mark.parametrize("torn", [b'{"event": "epo', b'{"event": "epoch"}', b"\0\0\0\0"])
def test_a_torn_last_line_is_dropped(path, torn):
    """A line is complete once its line end is on disk."""
    ledger = Ledger(path)
    ledger.append("a", n=1)
    complete = path.read_bytes()
    path.write_bytes(complete + torn)
    assert [event["event"] for event in read(path)] == ["a"]
    assert path.read_bytes() == complete + torn  # reading changes nothing
    ledger = Ledger(path)
    assert len(ledger) == 1
    ledger.append("b")
    assert path.read_bytes() == complete + b'{"event": "b"}\n'


def test_resuming_truncates_the_ledger_to_the_snapshot(path):
    """A run stopped after line 5 and resumed from a snapshot after line 2 writes the bytes of an uninterrupted run."""
    uninterrupted, digests = Ledger(path), [SHA256_OF_NOTHING]
    for number in range(6):
        uninterrupted.append("epoch", number=number)
        digests.append(uninterrupted.sha256)
    expected = path.read_bytes()
    assert digests[6] == hashlib.sha256(expected).hexdigest()

    uninterrupted.truncate(5, digests[5])
    path.write_bytes(path.read_bytes() + b"no JSON, but after the kept lines\n")
    resumed = Ledger(path)
    resumed.truncate(2, digests[2])
    assert len(resumed) == 2
    assert [event["number"] for event in read(path)] == [0, 1]
    for number in range(2, 6):
        resumed.append("epoch", number=number)
    assert path.read_bytes() == expected
    assert resumed.sha256 == digests[6]
    resumed.truncate(0, SHA256_OF_NOTHING)
    assert path.read_bytes() == b""


def test_a_ledger_that_does_not_match_the_snapshot_is_refused(path):
    """A mismatch is found even if every line is still JSON."""
    ledger = Ledger(path)
    for number in range(3):
        ledger.append("a", number=number)
    sha256, content = ledger.sha256, path.read_bytes()
    for damaged, problem in {
        b'{"event": "a"}\n': sentences.LEDGER_LINES_LEFT.format(1),
        content.replace(b"1", b"3"): sentences.LEDGER_LINES_DIFFER,
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=sentences.LEDGER_SHORTER.format(ledger=r"ledger\.jsonl", lines=3, found=problem)
        ):
            Ledger(path).truncate(3, sha256)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"3", b'{"n": 1}', b'{"event": "\xe4"}', b"null"])
def test_a_damaged_line_is_named(path, damage):
    content = b'{"event": "a"}\n' + damage + b'\n{"event": "c"}\n'
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentences.LEDGER_LINE_DAMAGED.format(ledger=r"ledger\.jsonl", line=2)):
        read(path)
    assert path.read_bytes() == content


def test_a_full_disk_is_reported_and_leaves_complete_lines(path, files_no_larger_than):
    ledger = Ledger(path)
    ledger.append("a", text="x" * 100)
    complete = path.read_bytes()
    with (
        files_no_larger_than(150),
        pytest.raises(
            UserError, match=sentences.FILE_NOT_WRITTEN.format(file=r"ledger\.jsonl", reason="File too large")
        ),
    ):
        ledger.append("b", text="y" * 100)
    assert path.read_bytes() != complete  # a part of the line was written
    assert len(Ledger(path)) == 1
    assert path.read_bytes() == complete


def test_unusable_paths_are_reported(tmp_path):
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format(".*No such file or directory")):
        Ledger(tmp_path / "missing" / "ledger.jsonl")
    for open_ledger in (read, Ledger):
        with pytest.raises(UserError, match=sentences.CANNOT_READ.format(".*Is a directory")):
            open_ledger(tmp_path)
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format(".*No such file or directory")):
        write_whole(tmp_path / "missing" / "file", b"")


def test_files_are_written_atomically(tmp_path, files_no_larger_than):
    path = tmp_path / "results.json"
    write_whole(path, b"old")
    with files_no_larger_than(1000), pytest.raises(UserError, match=sentences.CANNOT_WRITE.format("")):
        write_whole(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
