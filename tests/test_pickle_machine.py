"""The pickle machine agrees with python's pickle on plain values, runs nothing, and bounds everything."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import CorruptFile, FileError, HubtoolError, UnsafeFile, UnsupportedFile
from hubtool.formats import pickle_machine
from hubtool.formats.pickle_state import Truncated
from hubtool.formats.torch_objects import Inert, NumpyArray, Storage, Tensor
from tests.support.torch_files import number, pickled, storage, tensor, text

SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 300), 1 << 300) | st.floats(allow_nan=False)
    | st.text() | st.binary(max_size=300)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner) | st.tuples(inner, inner, inner) | st.tuples(inner, inner, inner, inner)
    | st.dictionaries(st.text() | st.integers(0, 999), inner, max_size=5),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(0, 5))
def test_plain_values_are_read_as_python_pickled_them(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    parsed = pickle_machine.run(data)
    assert (parsed.value, parsed.end) == (value, len(data))


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_ordered_containers_are_read(protocol: int) -> None:
    shared = [1, 2]
    value = pickle_machine.run(pickle.dumps(OrderedDict(a=shared, b=shared), protocol)).value
    assert value == {"a": [1, 2], "b": [1, 2]}
    assert value["a"] is value["b"]


def test_several_pickles_in_one_buffer_are_read_one_after_another() -> None:
    data = pickle.dumps(1) + pickle.dumps("two")
    first = pickle_machine.run(data)
    assert pickle_machine.run(data, first.end).value == "two"


@pytest.mark.parametrize("protocol", [2, 4])
def test_sets_and_bytearrays_become_plain_values(protocol: int) -> None:
    assert pickle_machine.run(pickle.dumps({7}, protocol)).value == [7]
    assert pickle_machine.run(pickle.dumps(frozenset([7]), protocol)).value == (7,)
    assert pickle_machine.run(pickle.dumps(bytearray(b"ab"), protocol)).value == b"ab"


def test_text_opcodes_understand_escapes() -> None:
    assert pickle_machine.run(b"S'a\\x41\\n\\'\\\\'\n.").value == "aA\n'\\"
    assert pickle_machine.run(b"S'\\xff'\n.").value == b"\xff"
    assert pickle_machine.run("Vé\\u20ac\\U0001f600\n.".encode("latin-1")).value == "é€\U0001f600"
    assert pickle_machine.run(b"I01\n.").value is True
    assert pickle_machine.run(b"(I3\nL4L\nF1.5\nt.").value == (3, 4, 1.5)


def test_defaultdicts_and_classes_as_keys_are_read_as_data() -> None:
    assert pickle_machine.run(pickle.dumps(defaultdict(list, a=[1]), 2)).value == {"a": [1]}
    body = b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\nK\x01s"
    parsed = pickle_machine.run(pickled(body))
    assert [str(key) for key in parsed.value] == ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
    assert parsed.inert == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


def test_known_classes_become_records_that_show_their_state() -> None:
    namespace = pickle_machine.run(pickled(b"cargparse\nNamespace\n)\x81}" + text("rank") + b"K\x08sb")).value
    assert isinstance(namespace, Inert)
    assert namespace.content() == {"rank": 8}
    path = pickle_machine.run(pickled(b"cpathlib\nPosixPath\n(" + text("a") + text("b") + b"tR")).value
    assert path.content() == ["a", "b"]


def test_numpy_scalars_and_arrays_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    for protocol in (2, 4):
        assert pickle_machine.run(pickle.dumps(numpy.float64(2.5), protocol)).value == 2.5
        array = pickle_machine.run(pickle.dumps(numpy.arange(6, dtype=">i2").reshape(2, 3), protocol)).value
        assert isinstance(array, NumpyArray)
        assert (array.shape, array.dtype.code, array.dtype.big, array.data) == (
            (2, 3),
            "i2",
            True,
            bytes([0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5]),
        )


def test_a_tensor_is_a_view_of_a_storage() -> None:
    value = pickle_machine.run(pickled(tensor())).value
    assert value == Tensor(Storage("F32", 4, "0", 4), "F32", 0, (2, 2), (2, 1))


class Payload:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [eval, exec, getattr, print, __import__, pickle.loads, open])
def test_every_other_global_is_refused_by_name(function: Any, protocol: int) -> None:
    with pytest.raises(UnsafeFile, match=function.__name__) as caught:
        pickle_machine.run(pickle.dumps(Payload(function, ("1",)), protocol), base=1000)
    assert caught.value.offset is not None
    assert caught.value.offset >= 1000


@pytest.mark.parametrize(
    "tail", [b"\xff", b"h\x09.", b"", b"0.", b"R" * 9], ids=["bad-opcode", "memo", "truncated", "popped", "underflow"]
)
def test_garbage_after_a_payload_does_not_hide_its_name(tail: bytes) -> None:
    with pytest.raises(UnsafeFile, match=r"os\.system"):
        pickle_machine.run(b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R" + tail)


@pytest.mark.parametrize(
    "name",
    [
        b"torch\nos.system",
        b"torch._utils\n_rebuild_tensor_v2.__globals__",
        b"collections\nOrderedDict.fromkeys",
        b"builtins\nmap",
    ],
)
def test_names_with_dots_never_reach_an_attribute(name: bytes) -> None:
    with pytest.raises(UnsafeFile):
        pickle_machine.run(b"\x80\x02c" + name + b"\n.")


WATCHED = """
import sys
from hubtool.errors import UnsafeFile
from hubtool.formats import pickle_machine
events = []
sys.addaudithook(lambda event, args: events.append(event))
try:
    pickle_machine.run(bytes.fromhex(sys.argv[1]))
except UnsafeFile as error:
    refused = str(error)
seen = list(events)
assert not [event for event in seen if event != "object.__getattr__"], seen
assert "xmlrpc.client.ServerProxy" in refused
"""


def test_nothing_is_imported_opened_or_started() -> None:
    data = pickled(b"cxmlrpc.client\nServerProxy\n" + text("http://a") + b"\x85RVtext\\u20ac\nS'a'\n\x87")
    done = subprocess.run([sys.executable, "-c", WATCHED, data.hex()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        b"(cos\nsystem\no",
        b"(ios\nsystem\n",
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\0\0\0",
        b"P1\n",
        b"\x97",
        b"N\x98",
        b")))\x92",
    ],
)
def test_opcodes_that_no_torch_file_needs_are_refused(body: bytes) -> None:
    with pytest.raises(UnsafeFile):
        pickle_machine.run(pickled(body))


@pytest.mark.parametrize(
    "body",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}b",  # a function cannot be given attributes
        b"ctorch\nFloatStorage\n)R", b"ctorch\nFloatStorage\n)\x81", b"cbuiltins\nint\n" + text("7") + b"\x85R",
        b"K\x01)R", b"K\x01}b", b"K\x01K\x02a", b"]K\x01K\x02s", b"K\x01K\x02\x93", b"ctorch._utils\n_rebuild_tensor_v2\n)\x81",
    ],
)  # fmt: skip
def test_calls_and_states_on_the_wrong_things_are_refused(body: bytes) -> None:
    with pytest.raises(UnsafeFile):
        pickle_machine.run(pickled(body))


@pytest.mark.parametrize(
    "claim",
    [
        b"X\xf0\xff\xff\xff", b"B\xf0\xff\xff\xff", b"T\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8,
        b"\x96" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x95" + b"\xff" * 8, b"r\xf0\xff\xff\xff",
        b"I" + b"9" * 1000 + b"\n", b"p99999999\n", b"L" + b"9" * 1000 + b"L\n", b"\x8a\xff" + b"\1" * 255,
    ],
)  # fmt: skip
def test_claims_are_checked_before_memory_is_taken(claim: bytes) -> None:
    with pytest.raises(FileError):
        pickle_machine.run(b"\x80\x04N" + claim + b"0.")


def test_copies_through_the_memo_are_bounded() -> None:
    big = text("x" * 50_000) + b"q\x00" + text("latin1") + b"q\x01\x86q\x02"
    again = b"c_codecs\nencode\nh\x02R"
    with pytest.raises(UnsafeFile, match="again and again"):
        pickle_machine.run(pickled(big + again * 1000 + b"0" * 1000))


@pytest.mark.parametrize("key", [b"]", b"}", tensor(), b"]\x85", b")\x85\x85\x85", number(1 << 61), number(-1 << 60)])
def test_keys_that_cannot_be_hashed_safely_are_refused(key: bytes) -> None:
    with pytest.raises(CorruptFile):
        pickle_machine.run(pickled(b"}" + key + b"Ns"))


def test_the_number_of_opcodes_is_bounded() -> None:
    with pytest.raises(UnsafeFile, match="opcodes"):
        pickle_machine.run(b"\x80\x02" + b"N0" * 1_000_001 + b"N.")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x02", b"\x80\x02(", b"\x80\x02X\x05\0\0\0ab", b"cos"])
def test_a_stream_that_stops_early_is_told_from_a_broken_one(data: bytes) -> None:
    with pytest.raises(Truncated):
        pickle_machine.run(data, more=True)


@pytest.mark.parametrize(
    "data", [b"\x80\x06N.", b"\x80\xffN.", b"N\x80\x02.", b"\x80\x02\x80\x02N.", b"NN.", b"(N.", b".", b"\x80\x02\xfe"]
)
def test_malformed_streams_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptFile):
        pickle_machine.run(data + b"............")


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        (storage(key="../x"), CorruptFile), (storage(key="a"), CorruptFile), (storage(numel=-1), CorruptFile),
        (storage(numel=1 << 62), CorruptFile), (storage(location="../../dev/null"), CorruptFile),
        (storage(location="meta"), UnsupportedFile), (storage(kind="Tensor"), CorruptFile), (text("0") + b"Q", UnsafeFile),
        (b"(" + text("module") + b"NNNNtQ", UnsafeFile),
    ],
)  # fmt: skip
def test_storage_claims_are_checked(inner: bytes, problem: type[HubtoolError]) -> None:
    with pytest.raises(problem):
        pickle_machine.run(pickled(tensor(inner=inner)))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("_rebuild_sparse_tensor", "sparse"),
        ("_rebuild_meta_tensor_no_storage", "meta"),
        ("_rebuild_nested_tensor", "nested"),
    ],
)
def test_tensors_that_are_not_plain_are_refused_by_name(name: str, word: str) -> None:
    with pytest.raises(UnsupportedFile, match=word):
        pickle_machine.run(pickled(f"ctorch._utils\n{name}\n)R".encode()))


def test_lazy_conjugate_and_negative_bits_are_refused() -> None:
    with pytest.raises(UnsupportedFile, match="neg/conj"):
        pickle_machine.run(pickled(tensor(more=b"}" + text("neg") + b"\x88s")))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    with suppress(CorruptFile, UnsafeFile, UnsupportedFile):
        pickle_machine.run(b"\x80\x02" + data)


def test_duplicate_keys_are_remembered() -> None:
    assert pickle_machine.run(pickled(b"}(" + (text("w") + b"N") * 2 + b"u")).duplicates == ("w",)
