"""Mutate valid files as a faulty disk, a faulty program or an attacker would."""

import random
import re
import struct
import zlib
from collections.abc import Callable

Draw = Callable[[int], int]  # draws an integer from 0 to below its argument

_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**30)
_WORDS = (
    *(str(number).encode() for number in _NUMBERS),
    *b"nan inf -inf 1e999 1e-999 0.5 null true false None True [] {} \"\" '' ../.. / .. ~".split(b" "),
    *b"\0 \n \r\n : - & * % @ # \xff\xfe \xc3\x28 \xce\xa9 =1+1 </script> $(ls) \x1b[2J".split(b" "),
    *(b"&a [*a]", b"<<: *a", b"!!python/object/apply:os.system [ls]", b"[" * 2000, b"{a: " * 500, b"9" * 5000),
)


def mutated(target: str, seeds: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """Return the name of one of a target's seeds and its mutated content, which depend on the arguments alone."""
    draw, names = random.Random(zlib.crc32(f"{target} {number}".encode())).randrange, list(seeds)
    seed, other = names[draw(len(names))], names[draw(len(names))]
    return seed, mutate(seeds[seed], seeds[other], draw)


def mutate(content: bytes, other: bytes, draw: Draw) -> bytes:
    """Return the content with one to four random changes; pieces of `other`, a valid file, may be spliced in."""
    changed = bytearray(content)
    for _ in range(1 + draw(4)):
        _CHANGES[draw(len(_CHANGES))](changed, other, draw)
    return _with_valid_checksums(bytes(changed)) if draw(2) else bytes(changed)


def _place(changed: bytearray, draw: Draw) -> int:
    """Draw a position: half the time anywhere, half the time in the first 200 bytes, where headers are."""
    return draw((min(len(changed), 200) if draw(2) else len(changed)) + 1)


def _flip(changed: bytearray, other: bytes, draw: Draw) -> None:
    if changed:
        changed[min(_place(changed, draw), len(changed) - 1)] ^= 1 << draw(8)


def _truncate(changed: bytearray, other: bytes, draw: Draw) -> None:
    del changed[_place(changed, draw) :]


def _remove(changed: bytearray, other: bytes, draw: Draw) -> None:
    start = _place(changed, draw)
    del changed[start : start + 1 + draw(64)]


def _repeat(changed: bytearray, other: bytes, draw: Draw) -> None:
    start = _place(changed, draw)
    piece = changed[start : start + 1 + draw(64)]
    changed[start:start] = piece * (1 + draw(100))


def _splice(changed: bytearray, other: bytes, draw: Draw) -> None:
    start, source = _place(changed, draw), draw(len(other) + 1)
    piece = other[source : source + 1 + draw(200)]
    changed[start : start + draw(2) * len(piece)] = piece


def _insert(changed: bytearray, other: bytes, draw: Draw) -> None:
    start = _place(changed, draw)
    changed[start:start] = _WORDS[draw(len(_WORDS))]


def _replace_word(changed: bytearray, other: bytes, draw: Draw) -> None:
    """Replace a number or word of a text by another value."""
    words = list(re.finditer(rb"[-+.\w]+", bytes(changed[:20_000])))
    if words:
        start, end = words[draw(len(words))].span()
        changed[start:end] = _WORDS[draw(len(_WORDS))]


def _forge_number(changed: bytearray, other: bytes, draw: Draw) -> None:
    """Overwrite a binary number by another one."""
    kind = "<>"[draw(2)] + "BHIQ"[draw(4)]
    size = struct.calcsize(kind)
    if len(changed) >= size:
        start = min(_place(changed, draw), len(changed) - size)
        struct.pack_into(kind, changed, start, _NUMBERS[draw(len(_NUMBERS))] % 256**size)


_CHANGES = (_flip, _truncate, _remove, _repeat, _splice, _insert, _replace_word, _forge_number)


def _with_valid_checksums(content: bytes) -> bytes:
    """Recompute the checksums of PNG and tar, so that the changes get past the reader's first check."""
    fixed = bytearray(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        at = 8
        while at + 12 <= len(fixed):
            end = at + 8 + struct.unpack_from(">I", fixed, at)[0]
            if end + 4 > len(fixed):
                break
            struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
            at = end + 4
    if content[257:262] == b"ustar":
        for at in range(0, len(fixed) - 511, 512):
            if fixed[at + 257 : at + 262] == b"ustar":
                fixed[at + 148 : at + 156] = b"        "
                fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)
