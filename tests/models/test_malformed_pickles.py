"""Pickles that are not plain state dicts are refused, whatever they would do when loaded."""

import contextlib
import io
import pickle
import pickletools
import zipfile

import numpy as np
import pytest

from iumad_jax.errors import UserError
from iumad_jax.models.state_dict import _ALLOWED, MAX_PICKLE, parse
from tests import sentences
from tests.models.pth import (
    BOMB,
    DEEP,
    FORMATS,
    HEAD,
    LEGACY_HEAD,
    PTH,
    STORED,
    WHOLE,
    number,
    numbers,
    several,
    state_dict,
    tensor,
    text,
    zipped,
)

pytestmark = pytest.mark.slow


ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
MANY = several(b"N" * 300_000) + b"q\0"
MALFORMED = {
    "no dictionary": (number(7) + b".", sentences.NOT_A_DICTIONARY),
    "a number as a key": (b"}" + number(1) + b"Ns.", sentences.KEY_NOT_A_STRING),
    "a deep key": (b"}" + DEEP + b"Ns.", sentences.KEY_NOT_A_STRING),
    "a deep key of an ordered dict": (ORDERED + b")R(" + DEEP + b"Nu.", sentences.KEY_NOT_A_STRING),
    "a bomb as a key": (b"}" + BOMB + b"Ns.", sentences.KEY_NOT_A_STRING),
    "a bomb as an ordered dict's item": (ORDERED + b"](" + BOMB + b"N\x86e\x85R.", "TypeError"),
    "a bomb as a storage's type": (
        several(text("storage"), BOMB, text("0"), text("cpu"), number(1)) + b"Q.",
        sentences.STORAGE_UNKNOWN,
    ),
    "a bomb as a storage's key": (WHOLE.replace(text("0"), BOMB) + b".", sentences.STORAGE_UNKNOWN),
    "a bomb as a size": (
        tensor(WHOLE, 0, (3,), (1,)).replace(numbers((3,)), BOMB + b"\x85") + b".",
        sentences.TENSOR_ARGUMENTS_INVALID,
    ),
    "a bomb that is called": (BOMB + b"NR.", sentences.CALL_REFUSED),
    "a bomb that is called with a bomb": (BOMB + BOMB + b"R.", sentences.CALL_REFUSED),
    "a bomb as arguments": (ORDERED + BOMB + b"R.", "TypeError"),
    "a bomb as attributes": (ORDERED + BOMB + b"b.", sentences.NOT_A_DICTIONARY),
    "a deep value": (DEEP + b".", sentences.NOT_A_DICTIONARY),
    "deep dictionaries": (
        b"}" + text("x") + b"q\0" + b"}h\0" * 100_000 + b"N" + b"s" * 100_001 + b".",
        sentences.NOT_A_TENSOR,
    ),
    "deep lists": (b"]" * 250_000 + b"a" * 249_999 + b".", sentences.NOT_A_DICTIONARY),
    "a list of itself": (b"]q\0h\0a.", sentences.NOT_A_DICTIONARY),
    "many marks": (b"(" * 500_000 + b".", sentences.PICKLE_DAMAGED),
    "many dictionaries": (b"}" * 500_000 + b"N.", sentences.NOT_A_DICTIONARY),
    "many sizes, many times": (
        MANY + (REBUILD + several(WHOLE, number(0), b"h\0h\0", b"NN") + b"R") * 5_000,
        sentences.TENSOR_ARGUMENTS_INVALID,
    ),
    "many arguments, many times": (MANY + (REBUILD + b"h\0R") * 15_000, sentences.CALL_REFUSED),
    "a long description": (
        WHOLE[:-2] + b"N" * 500_000 + b"tq\0" + b"Qh\0" * 1_000 + b".",
        sentences.STORAGE_UNKNOWN,
    ),
    "a list as arguments": (ORDERED + b"]R.", sentences.CALL_REFUSED),
    "a storage that is called": (WHOLE + b")R.", sentences.CALL_REFUSED),
    "a number type that is called": (b"ctorch\nFloatStorage\n)R.", sentences.CALL_REFUSED),
    "an unknown name": (b"ctorch\nload\n.", sentences.NAME_REFUSED.format(r"torch\.load")),
    "a dotted name": (
        b"ccollections\nOrderedDict.fromkeys\n.",
        sentences.NAME_REFUSED.format(r"collections\.OrderedDict\.fromkeys"),
    ),
    "a module with a dotted name": (b"ccollections.OrderedDict\nfromkeys\n.", sentences.NAME_REFUSED_PART),
    "an endless name": (b"c" + b"x" * 500_000 + b"\ny\n.", sentences.NAME_REFUSED.format("x{80}")),
    "a name with control characters": (b"c\x1b[2J\ny\n.", sentences.NAME_REFUSED.format(r"\\x1b\[2J\.y")),
    "a large memo index": (b"Nr\xff\xff\xff\xff.", sentences.NOT_A_DICTIONARY),
    "an empty stack for the memo": (b"r\xff\xff\xff\xff.", sentences.PICKLE_DAMAGED),
    "an empty memo": (b"h\x07.", sentences.PICKLE_DAMAGED),
    "a missing string": (b"X\xff\xff\xff\xffx", sentences.PICKLE_INCOMPLETE_OR_DAMAGED),
    "a missing number": (b"\x8a\xff\1", sentences.PICKLE_INCOMPLETE),
    "too many bytes": (b"N" * MAX_PICKLE + b".", sentences.PICKLE_TOO_LARGE.format(524288)),
    "no end": (b"}", sentences.PICKLE_INCOMPLETE_OR_OPERATION),
    "an empty pickle": (b"", sentences.PICKLE_INCOMPLETE_OR_OPERATION),
    "an empty stack at the end": (b".", sentences.PICKLE_DAMAGED),
    "no mark": (b"t.", sentences.PICKLE_DAMAGED),
    "half an item": (b"}(" + text("x") + b"u.", sentences.PICKLE_DAMAGED),
}


@pytest.mark.parametrize("name", MALFORMED)
@FORMATS
def test_malformed_pickles_are_refused(write, name):
    content, reason = MALFORMED[name]
    with pytest.raises(
        UserError, match=sentences.WEIGHTS_REFUSED_WITH_REASON.format(file=r"weights\.pth", reason=reason)
    ):
        parse(write(HEAD + content, STORED), PTH)


@pytest.mark.parametrize("name", MALFORMED)
@FORMATS
def test_malformed_pickles_of_checkpoints_are_refused_or_contain_tensors(write, name):
    content, _ = MALFORMED[name]
    for whole in (content, b"}" + text("state_dict") + content[:-1] + b"s."):
        with contextlib.suppress(UserError):
            assert all(
                isinstance(x, np.ndarray) for x in parse(write(HEAD + whole, STORED), PTH, checkpoint=True).values()
            )


def test_operations_that_no_state_dict_needs_are_refused():
    refused = """
        INST OBJ NEWOBJ NEWOBJ_EX STACK_GLOBAL EXT1 EXT2 EXT4 PERSID DUP POP POP_MARK LIST DICT
        EMPTY_SET ADDITEMS FROZENSET INT LONG LONG4 FLOAT BINFLOAT STRING BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE8
        SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER PUT GET MEMOIZE FRAME
    """
    codes = b"".join(getattr(pickle, name) for name in refused.split())
    unknown = set(range(256)) - {ord(operation.code) for operation in pickletools.opcodes}
    for code in {*codes, *unknown}:
        with pytest.raises(UserError, match=sentences.PICKLE_OPERATION_REFUSED):
            parse(zipped(HEAD + b"(" + ORDERED + b")" + bytes([code]) + b"\xff" * 8, STORED), PTH)


def test_no_attributes_are_set():
    for name in (ORDERED, REBUILD):
        with pytest.raises(UserError, match=sentences.NOT_A_DICTIONARY):
            parse(zipped(HEAD + name + b"N}" + text("marked") + b"Ns\x86b.", STORED), PTH)
    assert not any(hasattr(value, "marked") for value in _ALLOWED.values())


def test_odd_archives_are_refused():
    good = state_dict(x=tensor(WHOLE, 0, (24,), (1,)))
    two = io.BytesIO(zipped(good, STORED))
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("other/data.pkl", good)
    big_endian = io.BytesIO()
    with zipfile.ZipFile(big_endian, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("a/byteorder", "big")
    bomb = zipped(good, STORED | {"bomb": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    flipped = zipped(good, STORED).replace(STORED["0"], bytes(len(STORED["0"])))
    for data, reason in [
        (two.getvalue(), sentences.ARCHIVE_OF_SEVERAL_PICKLES.format(2)),
        (big_endian.getvalue(), sentences.BIG_ENDIAN),
        (bomb, sentences.COMPRESSED),
        (flipped, "CRC"),
        (b"PK\x03\x04", sentences.DOWNLOAD_AGAIN.format("it ends after 4 bytes")),
        (LEGACY_HEAD.replace(b"\x88", b"\x89") + good + pickle.dumps(["0"], 2), sentences.BYTE_ORDER_WRONG),
        (LEGACY_HEAD + good + HEAD + several(BOMB) + b".", sentences.STORAGE_KEY_NOT_A_STRING),
        (b"\n<!DOCTYPE html>", sentences.DOWNLOAD_AGAIN.format("a web page")),
        (b"version https://git-lfs.github.com/spec/v1", sentences.DOWNLOAD_AGAIN.format("Git LFS")),
    ]:
        with pytest.raises(UserError, match=reason):
            parse(data, PTH)
