"""The globals a torch pickle may name: about eighty, each mapped to a function of ours or to an inert stub. All else is refused.

Sources: spec/artefacts C.4 (what legitimate files contain), ``torch._utils`` and ``torch.storage`` for the argument lists.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from hubtool.errors import CorruptFile, UnsupportedFile
from hubtool.formats.torch_objects import (
    DTYPES,
    NUMPY,
    STORAGES,
    Name,
    NumpyArray,
    NumpyDtype,
    Storage,
    Tensor,
)

# Called with the number of bytes or items a call is about to copy; raises when the pickle asks for too much.
Spend = Callable[[int], None]
Args = tuple[Any, ...]


def _tensor(args: Args, _spend: Spend) -> Tensor:
    """``_rebuild_tensor[_v2](storage, offset, size, stride[, requires_grad, hooks[, metadata]])``."""
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, Storage):
        raise CorruptFile("a tensor is built on something that is not a storage")
    _plain_bits(args, 6)
    return Tensor(storage, storage.dtype, offset, shape, stride)


def _tensor_v3(args: Args, _spend: Spend) -> Tensor:
    """``_rebuild_tensor_v3(untyped storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])``."""
    storage, offset, shape, stride, dtype = *args[:4], args[6]
    if not (isinstance(storage, Storage) and isinstance(dtype, Name) and isinstance(dtype.value, str)):
        raise CorruptFile("a tensor is built on something that is not a storage with a dtype")
    _plain_bits(args, 7)
    return Tensor(storage, dtype.value, offset, shape, stride)


def _plain_bits(args: Args, at: int) -> None:
    """Refuse tensors whose bytes are not their values (torch's lazy negative and conjugate bits)."""
    if len(args) > at and isinstance(args[at], dict) and any(args[at].values()):
        raise UnsupportedFile(
            "a tensor carries torch's lazy neg/conj bit", hint="save it again after resolve_neg()/resolve_conj()"
        )


def _first(args: Args, _spend: Spend) -> Any:
    """``_rebuild_parameter(data, requires_grad, hooks)``: the data."""
    if not isinstance(args[0], Tensor):
        raise CorruptFile("a parameter is built on something that is not a tensor")
    return args[0]


def _from_type(args: Args, spend: Spend) -> Any:
    """``_rebuild_from_type_v2(function, type, args, state)`` for plain tensors and parameters that carry attributes."""
    function, _type, inner = args[:3]
    if not (isinstance(function, Name) and function.call in {_tensor, _tensor_v3, _first}):
        raise CorruptFile("_rebuild_from_type_v2 is used for something that is not a plain tensor")
    return function.call(inner, spend)


def _device_tensor(args: Args, _spend: Spend) -> Tensor:
    """``_rebuild_device_tensor_from_numpy(array, dtype, device, requires_grad)``: tensors trained on MPS or XLA."""
    array, dtype = args[:2]
    if not (isinstance(array, NumpyArray) and isinstance(dtype, Name) and isinstance(dtype.value, str)):
        raise CorruptFile("a device tensor is built on something that is not an array with a dtype")
    tensor = array_tensor(array)
    if tensor.dtype != dtype.value:
        raise UnsupportedFile(f"a device tensor of {dtype.value} is stored as {tensor.dtype}")
    return tensor


def array_tensor(array: NumpyArray) -> Tensor:
    """The tensor view of a numpy array, with strides in elements."""
    if array.dtype.code not in NUMPY or array.data is None:
        raise UnsupportedFile(f"a numpy array of type {array.dtype.code!r} has no numbers that can be read as they are")
    shape = array.shape
    stride, step = [], 1
    for size in shape if array.fortran else reversed(shape):
        stride.append(step)
        step *= size
    return Tensor(array, NUMPY[array.dtype.code][0], 0, shape, tuple(stride if array.fortran else reversed(stride)))


def _encode(args: Args, spend: Spend) -> bytes:
    """``_codecs.encode(text, 'latin1')``: how protocol 2 spells bytes."""
    if not (isinstance(args[0], str) and args[1:] in {("latin1",), ("latin-1",)}):
        raise CorruptFile("_codecs.encode is used for something other than latin-1 bytes")
    spend(len(args[0]))
    return args[0].encode("latin-1")


def _numpy_dtype(args: Args, _spend: Spend) -> NumpyDtype:
    code = args[0] if isinstance(args[0], str) and len(args[0]) < 16 else "?"
    return NumpyDtype(code.lstrip("<>|="), code.startswith(">"))


def _numpy_scalar(args: Args, _spend: Spend) -> Any:
    """``numpy.core.multiarray.scalar(dtype, bytes)``: the number; ``None`` for types we do not read."""
    dtype, data = args if len(args) == 2 else (None, None)
    if not (isinstance(dtype, NumpyDtype) and isinstance(data, bytes)):
        return None
    code = {"f8": "d", "f4": "f", "f2": "e", "b1": "?", "i1": "b", "u1": "B", "i8": "q", "i4": "i", "u4": "I"}.get(
        dtype.code
    )
    if code is None or len(data) != struct.calcsize("=" + code):
        return None
    return struct.unpack((">" if dtype.big else "<") + code, data)[0]


def _copied(kind: Callable[[Iterable[Any]], Any]) -> Callable[[Args, Spend], Any]:
    """A builtin container called with nothing, or with one list or tuple."""

    def call(args: Args, spend: Spend) -> Any:
        source = args[0] if args else ()
        if len(args) > 1 or not isinstance(source, list | tuple | bytes):
            raise CorruptFile("a builtin container is called with something unusual")
        spend(len(source))
        return kind(source)

    return call


def _plain_bytes(source: Iterable[Any]) -> bytes:
    return source if isinstance(source, bytes) else b""


def _mapping(args: Args, spend: Spend) -> dict[Any, Any]:
    """``dict``/``OrderedDict``, empty or from a list of pairs with plain keys."""
    pairs = args[0] if args else ()
    if len(args) > 1 or not isinstance(pairs, list | tuple):
        raise CorruptFile("a mapping is called with something unusual")
    spend(len(pairs))
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str | int) for pair in pairs):
        raise CorruptFile("a mapping is built from something that is not pairs")
    return dict(pairs)


def _defaultdict(_args: Args, _spend: Spend) -> dict[Any, Any]:
    return {}


def _device(args: Args, _spend: Spend) -> str:
    return ":".join(str(part) for part in args if isinstance(part, str | int))[:64]


def _stub(module: str, name: str) -> Name:
    return Name(module, name, inert=True)


def _refused(what: str) -> Callable[[Args, Spend], Any]:
    def call(_args: Args, _spend: Spend) -> Any:
        raise UnsupportedFile(
            f"the file holds {what}: only plain dense tensors are read", hint="save the plain tensors instead"
        )

    return call


_REBUILD = {
    "_rebuild_tensor": _tensor, "_rebuild_tensor_v2": _tensor, "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _first, "_rebuild_parameter_with_state": _first,
    "_rebuild_device_tensor_from_numpy": _device_tensor,
    "_rebuild_qtensor": _refused("a quantized tensor"), "_rebuild_sparse_tensor": _refused("a sparse tensor"),
    "_rebuild_sparse_csr_tensor": _refused("a sparse tensor"), "_rebuild_nested_tensor": _refused("a nested tensor"),
    "_rebuild_meta_tensor_no_storage": _refused("a tensor without data (device meta)"),
    "_rebuild_wrapper_subclass": _refused("a tensor of a wrapper class"),
}  # fmt: skip
_BUILTINS: dict[str, Callable[[Args, Spend], Any]] = {
    "list": _copied(list), "tuple": _copied(tuple), "set": _copied(list), "frozenset": _copied(tuple),
    "bytearray": _copied(_plain_bytes), "bytes": _copied(_plain_bytes), "dict": _mapping,
}  # fmt: skip
_WORDS = (
    "Tensor", "strided", "sparse_coo", "contiguous_format", "channels_last", "preserve_format",
    "per_tensor_affine", "per_channel_affine",
)  # fmt: skip
_QUANTIZED = ("QInt8", "QUInt8", "QInt32")
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_STUBS = {
    "torch.nn.modules.container": ("ParameterDict", "ParameterList"),
    "argparse": ("Namespace",), "types": ("SimpleNamespace",), "typing": ("Any",), "datetime": ("datetime", "timedelta"),
    "pathlib": ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "omegaconf.dictconfig": ("DictConfig",), "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("Metadata", "ContainerMetadata"),
    "omegaconf.nodes": ("AnyNode", "IntegerNode", "FloatNode", "StringNode", "BooleanNode", "BytesNode", "PathNode", "EnumNode"),
    **{f"{root}.callbacks.model_checkpoint": ("ModelCheckpoint",) for root in _LIGHTNING},
    **{f"{root}.callbacks.early_stopping": ("EarlyStopping",) for root in _LIGHTNING},
    **{f"{root}.utilities.parsing": ("AttributeDict",) for root in _LIGHTNING},
    **{f"{root}.utilities.data": ("AttributeDict",) for root in _LIGHTNING},
    **{f"{root}.utilities.types": ("_PATH",) for root in _LIGHTNING},
}  # fmt: skip


def _core() -> Iterable[Name]:
    yield Name("collections", "OrderedDict", _mapping)
    yield from (Name("torch._utils", name, call) for name, call in _REBUILD.items())
    yield Name("torch._tensor", "_rebuild_from_type_v2", _from_type)
    yield from (Name("torch", name, value=row) for name, row in STORAGES.items())
    yield from (Name("torch.cuda", name, value=row) for name, row in STORAGES.items())
    yield Name("torch.storage", "UntypedStorage", value=STORAGES["UntypedStorage"])
    yield from (Name("torch", name, value=dtype) for name, dtype in DTYPES.items())
    yield from (Name("torch", name) for name in _WORDS)
    # Mentioned so that a quantized tensor is refused as what it is.
    yield from (
        Name("torch", f"{name}Storage", value=(name.lower(), 4 if name == "QInt32" else 1)) for name in _QUANTIZED
    )
    yield from (Name("torch.nn.parameter", name) for name in ("Parameter", "Buffer"))
    yield Name("torch", "Size", _BUILTINS["tuple"])
    yield Name("torch", "device", _device)
    yield Name("torch.serialization", "_get_layout", _device)
    yield Name("_codecs", "encode", _encode)
    for module in ("builtins", "__builtin__"):
        yield from (Name(module, name, call) for name, call in _BUILTINS.items())
        yield from (Name(module, name) for name in ("int", "float", "str", "bool", "long", "unicode", "object"))


def _known_inert() -> Iterable[Name]:
    """What legitimate old files mention beside tensors: read as data, and reported."""
    yield from (_stub(module, name) for module, names in _STUBS.items() for name in names)
    yield Name("collections", "defaultdict", _defaultdict, inert=True)
    yield Name("numpy", "dtype", _numpy_dtype, inert=True)
    yield Name("numpy", "ndarray", inert=True)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        yield Name(module, "scalar", _numpy_scalar, inert=True)
        yield Name(module, "_reconstruct", lambda _args, _spend: NumpyArray(), inert=True)


ALLOWED = {(name.module, name.name): name for name in (*_core(), *_known_inert())}
