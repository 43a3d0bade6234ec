"""Weight recipes: which ones share the file's bytes, what packing gives, and what is said about bad files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from runtime import recipes
from runtime.errors import BuildError, CheckpointError
from runtime.recipes import Cast, Concat, Files, Leaf, Slice, Transpose

BF16 = np.dtype(ml_dtypes.bfloat16)


def evaluate(node: recipes.Node) -> np.ndarray:
    """The obvious, independent meaning of a recipe."""
    if isinstance(node, Leaf):
        return node.array()
    if isinstance(node, Concat):
        return np.concatenate([evaluate(part) for part in node.parts], node.axis)
    if isinstance(node, Transpose):
        return evaluate(node.part).transpose(node.perm)
    if isinstance(node, Cast):
        return evaluate(node.part).astype(recipes.NUMPY_DTYPES[node.dtype])
    assert isinstance(node, Slice)
    return evaluate(node.part)[node.index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {
        "a": rng.standard_normal((6, 5), np.float32).astype(BF16),
        "b": rng.standard_normal((4, 5), np.float32).astype(BF16),
        "c": rng.standard_normal((3, 5), np.float32).astype(np.float16),
        "d": rng.standard_normal((7, 2), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def entry(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    item = json.loads(raw[8 : 8 + length])[name]
    offset = 8 + length + item["data_offsets"][0]
    found = dict(file="model.safetensors", name=name, dtype=item["dtype"].lower(), shape=item["shape"], offset=offset)
    return {**found, **changes}


def stored(folder: Path, name: str) -> np.ndarray:
    item = entry(folder, name)
    raw = (folder / "model.safetensors").read_bytes()[item["offset"] :]
    dtype = recipes.NUMPY_DTYPES[item["dtype"]]
    return np.frombuffer(raw, dtype, int(np.prod(item["shape"]))).reshape(item["shape"])


def shares(array: np.ndarray | None, files: Files) -> bool:
    return array is not None and any(np.shares_memory(array, file.bytes) for file in files.open.values())


def test_a_leaf_is_a_view_of_the_file(folder: Path) -> None:
    files = Files(folder, folder)
    for offset in (entry(folder, "b")["offset"], None):  # given by the build, or looked up in the header
        array = recipes.view(recipes.parse(entry(folder, "b", offset=offset), files))
        assert shares(array, files)
        np.testing.assert_array_equal(array, stored(folder, "b"))


def test_adjacent_parts_are_a_view_and_others_are_packed(folder: Path) -> None:
    files = Files(folder, folder)
    first, second = sorted([entry(folder, "a"), entry(folder, "b")], key=lambda e: e["offset"])
    adjacent = {"concat": [first, second], "axis": 0}
    array = recipes.view(recipes.parse(adjacent, files))
    assert shares(array, files)
    expected = np.concatenate([stored(folder, first["name"]), stored(folder, second["name"])])
    np.testing.assert_array_equal(array, expected)

    halves = [{"slice": first, "axis": 0, "start": 0, "stop": 2}, {"slice": first, "axis": 0, "start": 2, "stop": 4}]
    assert shares(recipes.view(recipes.parse({"concat": halves, "axis": 0}, files)), files)

    for apart in ({"concat": [second, first], "axis": 0}, {"slice": first, "axis": 1, "start": 1, "stop": 3}):
        node = recipes.parse(apart, files)
        assert recipes.view(node) is None
        np.testing.assert_array_equal(recipes.pack(node), evaluate(node))


def test_transpose_and_cast(folder: Path) -> None:
    files = Files(folder, folder)
    turned = recipes.parse({"transpose": {"cast": entry(folder, "a"), "dtype": "f32"}, "perm": [1, 0]}, files)
    packed = recipes.pack(turned)
    assert packed.flags.c_contiguous and packed.dtype == np.float32
    np.testing.assert_array_equal(packed, stored(folder, "a").astype(np.float32).T)
    # Transposing twice, and casting to what it is already, change nothing: still a view.
    same = {"transpose": {"transpose": entry(folder, "a"), "perm": [1, 0]}, "perm": [1, 0]}
    assert shares(recipes.view(recipes.parse({"cast": same, "dtype": "bf16"}, files)), files)


def test_cast_of_a_cast_rounds_twice() -> None:
    values = np.array([1.0 + 2**-8 + 2**-20], np.float32)  # bf16 rounds it up, f32 -> f16 alone would keep more
    node = recipes.cast(recipes.cast(Leaf("x", "f32", (1,), memory=values), "bf16"), "f16")
    assert recipes.pack(node)[0] == np.float16(values.astype(BF16).astype(np.float32)[0])


def test_elements_that_are_not_aligned_are_packed(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "raw.bin").write_bytes(b"x" + values.tobytes())  # external data of an ONNX file, at an odd offset
    leaf = {"file": "raw.bin", "name": "w", "dtype": "f32", "shape": [2, 3], "offset": 1}
    node = recipes.parse(leaf, Files(tmp_path, tmp_path))
    assert recipes.view(node) is None
    np.testing.assert_array_equal(recipes.pack(node), values.reshape(2, 3))


def test_leaves_of_the_build_folder(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    save_file({"w": np.ones((2, 3), np.float32)}, tmp_path / "own" / "weights.safetensors")
    leaf = {"file": "weights.safetensors", "name": "w", "dtype": "f32", "shape": [2, 3], "offset": None, "build": True}
    node = recipes.parse(leaf, Files(tmp_path / "elsewhere", tmp_path / "own"))
    assert recipes.view(node) is not None


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> recipes.Node:
    """Random recipes over small 2-D tensors in memory."""
    if depth == 0 or draw(st.booleans()):
        rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        start = draw(st.integers(0, 99))
        array = np.arange(start, start + rows * columns, dtype=np.float32).reshape(rows, columns)
        return Leaf("leaf", "f32", array.shape, memory=array)
    kind = draw(st.sampled_from(["slice", "concat", "transpose", "cast"]))
    part = draw(trees(depth - 1))
    if kind == "slice":
        axis = draw(st.integers(0, 1))
        start = draw(st.integers(0, part.shape[axis] - 1))
        return recipes.slice_of(part, axis, start, draw(st.integers(start + 1, part.shape[axis])))
    if kind == "concat":
        return recipes.concat([part] * draw(st.integers(1, 3)), draw(st.integers(0, 1)))
    if kind == "transpose":
        return recipes.transpose(part, draw(st.sampled_from([(0, 1), (1, 0)])))
    return recipes.cast(part, draw(st.sampled_from(["f32", "f16", "bf16"])))


@given(trees())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_packing_means_what_the_recipe_says(node: recipes.Node) -> None:
    expected = evaluate(node)
    assert node.shape == expected.shape and recipes.NUMPY_DTYPES[node.dtype] == expected.dtype
    np.testing.assert_array_equal(recipes.pack(node), expected)
    shared = recipes.view(node)
    if shared is not None:
        np.testing.assert_array_equal(shared, expected)


@given(trees(), st.data())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_slices_are_pushed_down_without_changing_the_value(node: recipes.Node, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, node.shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, node.shape[axis]))
    index = [slice(None), slice(None)]
    index[axis] = slice(start, stop)
    sliced = recipes.slice_of(node, axis, start, stop)
    np.testing.assert_array_equal(recipes.pack(sliced), evaluate(node)[tuple(index)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, e: f.unlink(), "no such file"),
        (lambda f, e: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
        (lambda f, e: f.write_bytes(b""), "cannot be mapped"),
        (lambda f, e: f.write_bytes(b"\xff" * 100), "truncated"),
        (lambda f, e: f.write_bytes(struct.pack("<Q", 8) + b"not json"), "malformed"),
        (lambda f, e: save_file({"x": np.zeros(3, np.float32)}, f), "has no tensor a"),
        (lambda f, e: save_file({"a": np.zeros((6, 4), np.float16)}, f), r"is f16\[6, 4\]"),
        (lambda f, e: e.update(offset=e["offset"] + 2), "at byte"),
    ],
)
def test_bad_files_are_one_line(folder: Path, damage: Any, message: str) -> None:
    recipe = entry(folder, "a")
    damage(folder / "model.safetensors", recipe)
    with pytest.raises(CheckpointError, match=message) as raised:
        recipes.parse(recipe, Files(folder, folder))
    assert "model.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_raw_files_are_checked_for_length(tmp_path: Path) -> None:
    (tmp_path / "raw.bin").write_bytes(bytes(20))
    leaf = {"file": "raw.bin", "name": "w", "dtype": "f32", "shape": [2, 3], "offset": 0}
    with pytest.raises(CheckpointError, match="has 20 bytes, but w ends at 24"):
        recipes.parse(leaf, Files(tmp_path, tmp_path))
    with pytest.raises(BuildError, match="no offset"):
        recipes.parse({**leaf, "offset": None}, Files(tmp_path, tmp_path))


def test_recipes_that_do_not_fit_are_refused() -> None:
    a, b = (Leaf("w", "f32", (2, n), memory=np.zeros((2, n), np.float32)) for n in (3, 4))
    with pytest.raises(BuildError, match="joins"):
        recipes.concat([a, b], 0)
    with pytest.raises(BuildError, match="takes rows 1 to 5"):
        recipes.slice_of(a, 1, 1, 5)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found_wherever_they_are(dtype: str, value: float) -> None:
    size = recipes._SCAN_ELEMENTS + 3  # more than one piece
    clean = np.full(size, -1.5, recipes.NUMPY_DTYPES[dtype])
    clean[1] = np.finfo(np.float16).max if dtype == "f16" else 3e38
    assert not recipes.has_nonfinite(clean, dtype)
    for position in (0, recipes._SCAN_ELEMENTS - 1, size - 1):
        dirty = clean.copy()
        dirty[position] = value
        assert recipes.has_nonfinite(dirty, dtype)


def test_packing_does_not_keep_the_source_resident(tmp_path: Path) -> None:
    """64 MiB packed: the process grows by that and a chunk or two, not by source and copy."""
    script = f"""
import numpy as np, resource
from pathlib import Path
from safetensors.numpy import save_file
from runtime import recipes
folder = Path({str(tmp_path)!r})
rows = 1 << 15
save_file({{"a": np.ones((rows, 512), np.float16), "b": np.ones((rows, 512), np.float16)}}, folder / "w.safetensors")
files = recipes.Files(folder, folder)
def leaf(name):
    return dict(file="w.safetensors", name=name, dtype="f16", shape=[rows, 512], offset=None)
def resident(kind):
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) << 10
node = recipes.parse({{"concat": [leaf("b"), leaf("a")], "axis": 0}}, files)
assert recipes.view(node) is None
before = resident("RssFile")
packed = recipes.pack(node)
print(packed.nbytes, resident("RssFile") - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    packed, file_growth = map(int, done.stdout.split())
    assert packed == 64 << 20
    # Two chunks may be mapped while the next is read; without dropping it would be the whole 64 MiB.
    assert file_growth <= 2 * recipes._CHUNK_BYTES
