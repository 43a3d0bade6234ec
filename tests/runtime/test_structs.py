"""The C interface as Python sees it."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import ConfigError
from runtime.structs import PROTOTYPES, DataType, DeviceType, dtype_name


def test_devices_are_known_by_member_number_and_name() -> None:
    assert [member.target for member in DeviceType] == (
        "cpu nvidia cambricon ascend metax moore iluvatar kunlun hygon qy ali".split()
    )
    for device in (DeviceType.DEVICE_TYPE_ASCEND, 3, "ascend", "ASCEND"):
        assert DeviceType.parse(device) is DeviceType.DEVICE_TYPE_ASCEND
    for bad in (11, -1, "gpu", None, ""):
        with pytest.raises(ConfigError, match="device: found .*, expected one of cpu nvidia"):
            DeviceType.parse(bad)  # type: ignore[arg-type]


def test_dtypes_by_every_name() -> None:
    for same in ("f32", "float32", "torch.float32", np.float32, np.dtype("f4"), DataType.INFINI_DTYPE_F32):
        assert dtype_name(same) == "f32"
    assert dtype_name("bfloat16") == "bf16" and dtype_name(np.float16) == "f16"
    for bad in ("f64", np.int8, None, 3):
        with pytest.raises(ConfigError, match="expected one of f16 f32 bf16"):
            dtype_name(bad)


def test_prototypes_cover_the_whole_interface() -> None:
    assert len(PROTOTYPES) == 19
