"""The engine's C interface as ctypes: enums, structs, function prototypes. Mirrors the emitted qwen3_impl.hpp."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from enum import IntEnum
from typing import Any

import ml_dtypes
import numpy as np

from runtime.errors import ConfigError


class DeviceType(IntEnum):
    """infiniDevice_t, under the names that jiuge's users know."""

    DEVICE_TYPE_CPU = 0
    DEVICE_TYPE_NVIDIA = 1
    DEVICE_TYPE_CAMBRICON = 2
    DEVICE_TYPE_ASCEND = 3
    DEVICE_TYPE_METAX = 4
    DEVICE_TYPE_MOORE = 5
    DEVICE_TYPE_ILUVATAR = 6
    DEVICE_TYPE_KUNLUN = 7
    DEVICE_TYPE_HYGON = 8
    DEVICE_TYPE_QY = 9
    DEVICE_TYPE_ALI = 10

    @property
    def target(self) -> str:
        """The name that the command line uses, for example ``"cpu"``."""
        return self.name[len("DEVICE_TYPE_") :].lower()

    @classmethod
    def parse(cls, device: DeviceType | int | str) -> DeviceType:
        """Accepts a member, its number or its command line name; ConfigError otherwise."""
        for member in cls:
            if device == member or (isinstance(device, str) and device.lower() == member.target):
                return member
        raise ConfigError(f"device: found {device!r}, expected one of {' '.join(member.target for member in cls)}")


class DataType(IntEnum):
    """infiniDtype_t."""

    INFINI_DTYPE_INVALID = 0
    INFINI_DTYPE_BYTE = 1
    INFINI_DTYPE_BOOL = 2
    INFINI_DTYPE_I8 = 3
    INFINI_DTYPE_I16 = 4
    INFINI_DTYPE_I32 = 5
    INFINI_DTYPE_I64 = 6
    INFINI_DTYPE_U8 = 7
    INFINI_DTYPE_U16 = 8
    INFINI_DTYPE_U32 = 9
    INFINI_DTYPE_U64 = 10
    INFINI_DTYPE_F8 = 11
    INFINI_DTYPE_F16 = 12
    INFINI_DTYPE_F32 = 13
    INFINI_DTYPE_F64 = 14
    INFINI_DTYPE_C16 = 15
    INFINI_DTYPE_C32 = 16
    INFINI_DTYPE_C64 = 17
    INFINI_DTYPE_C128 = 18
    INFINI_DTYPE_BF16 = 19


# Short names, as manifests and command lines spell them; safetensors writes the same in capitals.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u32": np.dtype(np.uint32),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
COMPUTE_DTYPES = {
    "f16": DataType.INFINI_DTYPE_F16,
    "f32": DataType.INFINI_DTYPE_F32,
    "bf16": DataType.INFINI_DTYPE_BF16,
}
_LONG_NAMES = {"float16": "f16", "half": "f16", "float32": "f32", "float": "f32", "bfloat16": "bf16"}


def dtype_name(dtype: Any) -> str:
    """``"f32" | "f16" | "bf16"`` for that name, the long name, or a numpy or torch dtype (torch is not imported)."""
    if isinstance(dtype, DataType):
        text = dtype.name[len("INFINI_DTYPE_") :].lower()
    elif isinstance(dtype, str) or str(dtype).startswith("torch."):
        text = str(dtype).removeprefix("torch.").lower()
    else:
        try:
            text = np.dtype(dtype).name
        except TypeError:
            text = str(dtype)
    text = _LONG_NAMES.get(text, text)
    if text not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}, expected one of {' '.join(COMPUTE_DTYPES)}")
    return text


STATUS_NAMES = {
    0: "SUCCESS",
    1: "INTERNAL_ERROR",
    2: "NOT_IMPLEMENTED",
    3: "BAD_PARAM",
    4: "NULL_POINTER",
    5: "DEVICE_TYPE_NOT_SUPPORTED",
    6: "DEVICE_NOT_FOUND",
    7: "DEVICE_NOT_INITIALIZED",
    8: "DEVICE_ARCHITECTURE_NOT_SUPPORTED",
    10: "BAD_TENSOR_DTYPE",
    11: "BAD_TENSOR_SHAPE",
    12: "BAD_TENSOR_STRIDES",
    13: "INSUFFICIENT_WORKSPACE",
}
STATUS_INTERNAL_ERROR = 1
STATUS_BAD_PARAM = 3
STATUS_OUT_OF_KV_MEMORY = 13


class Qwen3MetaCStruct(ctypes.Structure):
    """Qwen3Meta: what the engine was compiled for."""

    _fields_ = [
        ("dt_logits", c_int),
        ("nlayer", c_uint32),
        ("d", c_uint32),
        ("nh", c_uint32),
        ("nkvh", c_uint32),
        ("dh", c_uint32),
        ("di", c_uint32),
        ("dctx", c_uint32),
        ("dvoc", c_uint32),
        ("epsilon", c_float),
        ("theta", c_float),
        ("end_token", c_uint32),
        ("scale_input", c_float),
        ("scale_output", c_float),
        ("scale_o", c_float),
        ("scale_down", c_float),
    ]


class Qwen3WeightsCStruct(ctypes.Structure):
    """Qwen3Weights: host pointers, one per weight or one array of nlayer pointers."""

    _fields_ = [
        ("nlayer", c_size_t),
        ("dt_norm", c_int),
        ("dt_mat", c_int),
        ("transpose_linear_weights", c_int),
        ("input_embd", c_void_p),
        ("output_norm", c_void_p),
        ("output_embd", c_void_p),
        ("attn_norm", POINTER(c_void_p)),
        ("attn_qkv", POINTER(c_void_p)),
        ("attn_qkv_b", POINTER(c_void_p)),
        ("attn_q_norm", POINTER(c_void_p)),
        ("attn_k_norm", POINTER(c_void_p)),
        ("attn_o", POINTER(c_void_p)),
        ("ffn_norm", POINTER(c_void_p)),
        ("ffn_gate_up", POINTER(c_void_p)),
        ("ffn_down", POINTER(c_void_p)),
    ]


def field_names(struct: type[ctypes.Structure]) -> list[str]:
    return [field[0] for field in struct._fields_]


class KVPoolInfoCStruct(ctypes.Structure):
    """Qwen3KVPoolInfo; blocks count as 0 where caches are contiguous."""

    _fields_ = [
        ("block_size", c_uint32),
        ("total_blocks", c_uint32),
        ("free_blocks", c_uint32),
        ("bytes_per_token", c_uint64),
        ("bytes_allocated", c_uint64),
    ]


_MODEL, _CACHE, _U32S, _FLOATS = c_void_p, c_void_p, POINTER(c_uint32), POINTER(c_float)

# name -> (result, arguments). infiniStatus_t is an int.
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "createQwen3Model": (
        _MODEL,
        [POINTER(Qwen3MetaCStruct), POINTER(Qwen3WeightsCStruct), c_int, c_int, POINTER(c_int)],
    ),
    "destroyQwen3Model": (None, [_MODEL]),
    "qwen3LastError": (c_char_p, []),
    "inferBatch": (
        c_int,
        [_MODEL, _U32S, c_uint32, _U32S, c_uint32, _U32S, POINTER(_CACHE), _FLOATS, _U32S, _FLOATS, _FLOATS, _U32S],
    ),
    "forwardBatch": (
        c_int,
        [_MODEL, _U32S, c_uint32, _U32S, c_uint32, _U32S, POINTER(_CACHE), _U32S, c_uint32, _FLOATS],
    ),
    "createKVCache": (_CACHE, [_MODEL, c_size_t]),
    "duplicateKVCache": (_CACHE, [_MODEL, _CACHE, c_uint32]),
    "trimKVCache": (c_int, [_MODEL, _CACHE, c_uint32]),
    "reserveKVCache": (c_int, [_MODEL, _CACHE, c_uint32]),
    "lengthKVCache": (c_uint32, [_CACHE]),
    "dropKVCache": (c_int, [_MODEL, _CACHE]),
    "setKVPoolSize": (c_int, [_MODEL, c_uint64]),
    "getKVPoolInfo": (c_int, [_MODEL, POINTER(KVPoolInfoCStruct)]),
    "exportKVCache": (c_int, [_MODEL, _CACHE, c_uint32, c_uint32, c_void_p]),
    "importKVCache": (c_int, [_MODEL, _CACHE, c_uint32, c_uint32, c_void_p]),
    "setTrace": (c_int, [_MODEL, c_int]),
    "setCapture": (c_int, [_MODEL, c_int]),
    "getQwen3Counter": (c_uint64, [_MODEL, c_char_p]),
    "getQwen3Meta": (POINTER(Qwen3MetaCStruct), []),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give every function of the engine its prototype; AttributeError names one that is missing."""
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
