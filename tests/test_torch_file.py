"""The PyTorch reader: right on honest files, and never anything else on the others."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rsft.backbones import _lite0 as torch_file
from keras_rsft.backbones._lite0 import read_state_dict
from keras_rsft.errors import WeightsUnavailable

pytestmark = pytest.mark.filterwarnings("error")

PROTO, STOP, MARK = b"\x80\x02", b".", b"("
MAGIC = PROTO + b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" + STOP
VERSION = PROTO + b"M\xe9\x03" + STOP
LITTLE, BIG = b"\x88", b"\x89"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def wholes(values) -> bytes:
    return MARK + b"".join(whole(value) for value in values) + b"t"


def system(byte_order: bytes = LITTLE) -> bytes:
    return PROTO + b"}" + text("little_endian") + byte_order + b"s" + STOP


def storage(key="0", kind="FloatStorage", length=6, view=b"N", tag="storage") -> bytes:
    kind = b"ctorch\n" + kind.encode() + b"\n"
    numbers = text(tag) + kind + text(key) + text("cpu") + whole(length) + view
    return MARK + numbers + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, where=None) -> bytes:
    layout = whole(offset) + wholes(shape) + wholes(strides)
    described = (where or storage()) + layout + b"\x89" + ORDERED_DICT
    return REBUILD + MARK + described + b"t" + b"R"


def state(**tensors: bytes) -> bytes:
    items = b"".join(text(name) + each for name, each in tensors.items())
    return PROTO + ORDERED_DICT + MARK + items + b"u" + STOP


def key_list(*keys: str) -> bytes:
    return PROTO + b"]" + MARK + b"".join(text(key) for key in keys) + b"e" + STOP


def numbers(values, dtype="<f4", count=None) -> bytes:
    values = np.asarray(values, dtype)
    return struct.pack("<q", values.size if count is None else count) + values.tobytes()


SIX = numbers(range(6))
HEADER = MAGIC + VERSION + system()
HONEST = HEADER + state(weight=tensor()) + key_list("0") + SIX


def with_tensor(content: bytes) -> bytes:
    return HEADER + state(weight=content) + key_list("0") + SIX


def read(content: bytes, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return read_state_dict(path)


def test_reads_shape_and_values(tmp_path):
    arrays = read(HONEST, tmp_path)
    assert list(arrays) == ["weight"]
    assert arrays["weight"].dtype == np.float32
    assert arrays["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    arrays["weight"][0, 0] = 9  # An array of its own, not a view of the file.


@pytest.mark.parametrize(
    "shape, strides, offset, expected",
    [
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2,), (1,), 4, [4, 5]),
        ((), (), 5, 5),
        ((2, 2), (0, 1), 1, [[1, 2], [1, 2]]),
        ((1, 2), (2**70, 3), 0, [[0, 3]]),
    ],
    ids=["transposed", "offset", "scalar", "repeated", "unused-stride"],
)
def test_reads_any_layout_within_the_storage(
    tmp_path, shape, strides, offset, expected
):
    arrays = read(with_tensor(tensor(shape, strides, offset)), tmp_path)
    assert arrays["weight"].tolist() == expected


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("DoubleStorage", "<f8"),
        ("FloatStorage", "<f4"),
        ("HalfStorage", "<f2"),
        ("LongStorage", "<i8"),
        ("IntStorage", "<i4"),
        ("ShortStorage", "<i2"),
        ("CharStorage", "i1"),
        ("ByteStorage", "u1"),
    ],
)
def test_reads_each_kind_of_number(tmp_path, kind, dtype):
    body = tensor((3,), (1,), where=storage(kind=kind, length=3))
    content = HEADER + state(w=body) + key_list("0") + numbers([1, 2, 100], dtype)
    array = read(content, tmp_path)["w"]
    assert array.dtype == np.dtype(dtype)
    assert array.tolist() == [1, 2, 100]


def test_tensors_may_share_a_storage_and_keys_come_in_any_order(tmp_path):
    other = storage("1", "LongStorage", 1)
    tensors = state(
        a=tensor((3,), (1,)), b=tensor((3,), (1,), 3), c=tensor((), (), where=other)
    )
    content = HEADER + tensors + key_list("1", "0") + numbers([7], "<i8") + SIX
    arrays = read(content, tmp_path)
    assert [arrays[name].tolist() for name in "abc"] == [[0, 1, 2], [3, 4, 5], 7]


def test_every_truncation_is_refused(tmp_path):
    for length in range(len(HONEST)):
        with pytest.raises(WeightsUnavailable, match=r"weights\.pth"):
            read(HONEST[:length], tmp_path)


def test_code_in_the_file_is_refused_and_never_runs(tmp_path):
    ran = tmp_path / "ran"
    command = text(f"touch {ran}")
    for module in ("os", "posix", "subprocess"):
        call = f"c{module}\nsystem\n".encode() + command + b"\x85R"
        with pytest.raises(WeightsUnavailable, match=f"`{module} system`.*not allowed"):
            read(with_tensor(call), tmp_path)
    by_stack = text("os") + text("system") + b"\x93" + command + b"\x85R"
    with pytest.raises(WeightsUnavailable, match="STACK_GLOBAL is not allowed"):
        read(with_tensor(by_stack), tmp_path)
    assert not ran.exists()


NESTED = b")" + b"2\x86" * 60  # DUP is refused; see below for the memo's way.
NESTED_BY_MEMO = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60

HOSTILE = {
    "empty": b"",
    "text": b"hello world, this is no PyTorch file\n",
    "zip": b"PK\x03\x04" + bytes(100),
    "magic": VERSION + VERSION + system() + HONEST[len(HEADER) :],
    "version": MAGIC + MAGIC + system() + HONEST[len(HEADER) :],
    "big-endian": MAGIC + VERSION + system(BIG) + HONEST[len(HEADER) :],
    "trailing": HONEST + b"\x00",
    "count-too-large": HONEST.replace(SIX, numbers(range(6), count=2**62)),
    "count-negative": HONEST.replace(SIX, numbers(range(6), count=-1)),
    "length-huge": with_tensor(tensor(where=storage(length=2**900))),
    "length-huge-and-count": HEADER
    + state(weight=tensor(where=storage(length=2**61)))
    + key_list("0")
    + numbers([], count=2**61),
    "shape-huge": with_tensor(tensor((2**40, 2**40), (0, 0))),
    "shape-negative": with_tensor(tensor((-2, -3), (3, 1))),
    "shape-empty": with_tensor(tensor((0, 2**70), (1, 1))),
    "stride-beyond": with_tensor(tensor((2, 3), (4, 1))),
    "stride-negative": with_tensor(tensor((2, 3), (-3, 1))),
    "offset-beyond": with_tensor(tensor(offset=1)),
    "offset-negative": with_tensor(tensor(offset=-1)),
    "rank": with_tensor(tensor((1,) * 40, (0,) * 40)),
    "rank-differs": with_tensor(tensor((2, 3), (3,))),
    "view": with_tensor(tensor(where=storage(view=wholes([0, 1])))),
    "storage-tag": with_tensor(tensor(where=storage(tag="module"))),
    "storage-kind": with_tensor(tensor(where=storage(kind="QUInt8Storage"))),
    "storage-is-no-tuple": with_tensor(text("0") + b"Q"),
    "storage-is-a-number": with_tensor(REBUILD + wholes([1, 2, 3, 4, 5, 6]) + b"R"),
    "call-without-arguments": with_tensor(REBUILD + b")R"),
    "call-of-a-text": with_tensor(text("os.system") + b")R"),
    "ordered-dict-of-items": with_tensor(ORDERED_DICT[:-2] + wholes([1]) + b"R"),
    "build-on-a-tensor": with_tensor(tensor() + b"}b"),
    "build-on-a-storage": with_tensor(storage() + b"}b"),
    "build-on-a-name": with_tensor(REBUILD + b"}b"),
    "build-on-a-dict": with_tensor(b"}" + b"}b"),
    "memo-far": HEADER + PROTO + b"}r\xff\xff\xff\xffj\xfe\xff\xff\xff" + STOP,
    "deep-key": HEADER + PROTO + b"})" + b"\x85" * 300_000 + b"Ns" + STOP,
    "deep-key-of-a-call": HEADER
    + PROTO
    + ORDERED_DICT[:-2]
    + b"])\x85\x85a\x85R"
    + STOP,
    "not-a-tensor": with_tensor(text("weight")),
    "not-a-dict": HEADER + PROTO + b"]" + STOP + key_list("0") + SIX,
    "number-as-name": HEADER + PROTO + b"}" + whole(1) + b"Ns" + STOP + key_list(),
    "odd-items": HEADER + PROTO + b"}" + MARK + text("a") + b"u" + STOP + key_list(),
    "no-mark": HEADER + PROTO + b"}u" + STOP,
    "no-memo": HEADER + PROTO + b"h\x07" + STOP,
    "empty-stack": HEADER + PROTO + STOP,
    "append-to-dict": HEADER + PROTO + b"}Na" + STOP,
    "keys-missing": HEADER + state(weight=tensor()) + key_list() + SIX,
    "keys-twice": HEADER + state(weight=tensor()) + key_list("0", "0") + SIX + SIX,
    "keys-other": HEADER + state(weight=tensor()) + key_list("1") + SIX,
    "keys-not-text": HEADER + state(w=tensor()) + PROTO + b"]Na" + STOP + SIX,
    "storages-disagree": HEADER
    + state(a=tensor(), b=tensor(where=storage(kind="IntStorage")))
    + key_list("0")
    + SIX,
    "text-of-4-gigabytes": HEADER + PROTO + b"X\xff\xff\xff\xff" + b"a" * 8,
    "bytes-of-2-to-the-63": HEADER + PROTO + b"\x8e" + b"\xff" * 8,
    # Text opcodes have decoders of their own, which are not to be reached.
    "text-opcode": HEADER + PROTO + b"S'\\_'\n" + STOP,
    "escape-in-a-name": HEADER + PROTO + b"ctorch\\o\nload\n" + STOP,
    "duplicate-opcode": HEADER + PROTO + NESTED + STOP,
    # 2^60 tuples when walked or hashed; as a name, and as everything else.
    "bomb-as-name": HEADER + PROTO + b"}" + NESTED_BY_MEMO + b"Ns" + STOP,
    "bomb-as-tensor": with_tensor(NESTED_BY_MEMO),
    "bomb-as-shape": with_tensor(REBUILD + NESTED_BY_MEMO + b"R"),
    "bomb-as-storage": with_tensor(NESTED_BY_MEMO + b"Q"),
    "bomb-as-view": with_tensor(tensor(where=storage(view=NESTED_BY_MEMO))),
    "bomb-as-keys": HEADER + state(w=tensor()) + PROTO + NESTED_BY_MEMO + STOP + SIX,
    "bomb-as-magic": PROTO + NESTED_BY_MEMO + STOP,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    with pytest.raises(WeightsUnavailable, match=r"weights\.pth") as caught:
        read(HOSTILE[name], tmp_path)
    assert len(str(caught.value)) < 400


def test_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsUnavailable, match=r"absent\.pth: No such file"):
        read_state_dict(tmp_path / "absent.pth")


def test_newer_format_is_recognised(tmp_path):
    with pytest.raises(WeightsUnavailable, match="_use_new_zipfile_serialization"):
        read(HOSTILE["zip"], tmp_path)


def test_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_OPCODES", 20)
    with pytest.raises(WeightsUnavailable, match="more than 20 pickle opcodes"):
        read(HONEST, tmp_path)


@given(position=st.integers(0, len(HONEST) - 1), value=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused(tmp_path_factory, position, value):
    content = bytearray(HONEST)
    content[position] = value
    _read_or_refuse(bytes(content), tmp_path_factory)


@given(st.binary(max_size=200), st.sampled_from([b"", MAGIC, HEADER, HEADER + PROTO]))
def test_random_bytes_are_read_or_refused(tmp_path_factory, content, start):
    _read_or_refuse(start + content, tmp_path_factory)


def _read_or_refuse(content: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(content)
    try:
        arrays = read_state_dict(path)
    except WeightsUnavailable:
        return
    assert all(array.nbytes <= len(content) for array in arrays.values())
