"""Engine, and what opening a model checks, over the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import BuildError, CheckpointError, ConfigError, InfiniCoreError
from runtime.qwen3 import InferTask, Qwen3ForCausalLM
from runtime.structs import DeviceType
from tests.runtime import fakes
from tests.runtime.fakes import answer

PROMPT = [5, 9, 2, 600, 14, 7, 7, 1]


# ----------------------------------------------------------------------------------------------------- engine


def test_engine_calls(open_fake: Any) -> None:
    engine: Engine = open_fake().engine
    a, b = engine.create_cache(), engine.create_cache(100)
    rows = engine.forward([1, 2, 3, 4, 5], [3, 2], [0, 0], [a, b])
    chosen = engine.forward([1, 2, 3, 4, 5], [3, 2], [0, 0], [a, b], [4, 0])
    np.testing.assert_array_equal(rows[1], chosen[0])
    first = engine.infer([1, 2, 3], [3], [0], [a], [1.0], [1], [1.0])
    assert first.dtype == np.uint32 and first[0] == rows[0].argmax()
    copy = engine.duplicate_cache(a, 2)
    assert [engine.cache_length(cache) for cache in (a, b, copy)] == [3, 2, 2]
    np.testing.assert_array_equal(engine.forward([3], [1], [2], [copy])[0], rows[0])
    engine.trim_cache(a, 1)
    engine.reserve_cache(a, 50)
    assert engine.cache_length(a) == 1
    saved = engine.export_cache(b, 0, 2, np.dtype(np.uint16))
    assert saved.shape == (3, 2, 2, 2, 8)
    engine.import_cache(a, 1, saved)
    assert engine.cache_length(a) == 3
    expected = engine.forward([1, 4, 5, 6], [4], [0], [engine.create_cache()])
    np.testing.assert_array_equal(engine.forward([6], [1], [3], [a]), expected)
    info = engine.pool_info()
    assert info["block_size"] == 16 and info["total_blocks"] - info["free_blocks"] == 4
    assert engine.counter("steps") == 6 and engine.compiled_meta().dh == 8
    engine.set_trace(False)
    with pytest.raises(BuildError, match="import_cache: values are"):
        engine.import_cache(a, 0, saved[:2])


def test_engine_errors_carry_call_status_and_text(open_fake: Any) -> None:
    engine: Engine = open_fake().engine
    cache = engine.create_cache()
    with pytest.raises(
        InfiniCoreError, match=r"inferBatch failed with status 3: token 608: status 3 \(BAD_PARAM\)"
    ) as e:
        engine.infer([608], [1], [0], [cache], [1.0], [1], [1.0])
    assert (e.value.call, e.value.status) == ("inferBatch", 3)
    for call in (
        lambda: engine.infer([1], [1], [5], [cache], [1.0], [1], [1.0]),  # after a hole
        lambda: engine.forward([1, 2], [1, 1], [0, 0], [cache, cache]),  # one cache twice
        lambda: engine.trim_cache(cache, 9),
        lambda: engine.duplicate_cache(cache, 9),
    ):
        with pytest.raises(InfiniCoreError):
            call()
    engine.drop_cache(cache)
    for call in (
        lambda: engine.drop_cache(cache),
        lambda: engine.cache_length(cache),
        lambda: engine.trim_cache(1234, 0),
    ):
        with pytest.raises(InfiniCoreError, match="is not one of this model, or was dropped"):
            call()


def test_close_is_final_and_may_be_repeated(open_fake: Any) -> None:
    model = open_fake()
    task = InferTask("t", PROMPT, 5)
    model.batch_infer_one_round([task])
    cache = model.create_kv_cache()
    model.generate(PROMPT, 3)
    model.close()
    model.destroy_model_instance()
    assert model.engine.closed
    for call in (lambda: model.batch_infer_one_round([task]), lambda: model.engine.pool_info()):
        with pytest.raises(InfiniCoreError, match="the model is closed"):
            call()
    with pytest.raises(ConfigError, match="finalized"):
        model.generate(PROMPT)
    model.drop_kv_cache(cache)  # went with the model


def test_a_refused_model_leaks_nothing(fake_build: Path, no_infinicore: None) -> None:
    with pytest.raises(InfiniCoreError, match="createQwen3Model failed with status 3: createQwen3Model: status 3"):
        Qwen3ForCausalLM(build=fake_build, ndev=2)


# ----------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(build=None), "model_dir_path: expected a model folder, or build="),
        (dict(build="nowhere"), "expected a build folder .*found no manifest.json"),
        (dict(model_dir_path="nowhere"), "nowhere: no such folder, expected a Hugging Face model directory"),
        (dict(dtype="f32"), "was built for dtype bf16, asked for dtype f32"),
        (dict(device="ascend"), "was built for device cpu, asked for device ascend"),
        (dict(quant="w8a8"), "was built for quant none, asked for quant w8a8"),
        (dict(max_tokens=97), "max_tokens is 97, expected 1 to 96, the build's context"),
        (dict(ndev=0), "ndev is 0"),
        (dict(prefill_chunk=0), "prefill_chunk is 0"),
        (dict(threads=0), "threads is 0"),
        (dict(device=99), "device: found 99"),
        (dict(kv="contiguous"), "was built for kv paged, asked for kv contiguous"),
        (dict(kv_pool_tokens="a"), "kv_pool_tokens is 'a', expected a whole number, at least 1"),
        (dict(kv_pool_tokens=0), "kv_pool_tokens is 0"),
    ],
)
def test_bad_arguments(open_fake: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, BuildError), match=message):
        open_fake(**options)


def edit_manifest(build: Path, **changes: Any) -> None:
    path = build / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bad_builds(fake_library: Path, tmp_path: Path, no_infinicore: None) -> None:
    checkpoint = fakes.write_checkpoint(tmp_path / "model")
    build = fakes.write_build(tmp_path / "out", checkpoint, fake_library)
    edit_manifest(build, library=None)
    (build / "libqwen3.so").rename(tmp_path / "compiled.so")
    with pytest.raises(BuildError, match="was built with --emit-only: compile it and put libqwen3.so there"):
        Qwen3ForCausalLM(build=build)
    (tmp_path / "compiled.so").rename(build / "libqwen3.so")
    edit_manifest(build, library="libqwen3.so", format=7)
    with pytest.raises(BuildError, match="found format 7, expected 1; build it again"):
        Qwen3ForCausalLM(build=build)
    (build / "manifest.json").write_text("{")
    with pytest.raises(BuildError, match="manifest.json is not readable"):
        Qwen3ForCausalLM(build=build)
    (build / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(BuildError, match="target is missing; build it again"):
        Qwen3ForCausalLM(build=build)
    build = fakes.write_build(tmp_path / "out", checkpoint, fake_library)
    (build / "libqwen3.so").write_bytes(b"no library")
    with pytest.raises(BuildError, match="libqwen3.so cannot be loaded"):
        Qwen3ForCausalLM(build=build)
    (build / "libqwen3.so").unlink()
    with pytest.raises(BuildError, match="the engine libqwen3.so is missing"):
        Qwen3ForCausalLM(build=build)


def test_an_emitted_folder_that_was_compiled_by_hand(fake_library: Path, tmp_path: Path, no_infinicore: None) -> None:
    build = fakes.write_build(tmp_path / "out", fakes.write_checkpoint(tmp_path / "model"), fake_library)
    edit_manifest(build, library=None)
    with Qwen3ForCausalLM(build=build) as model:
        assert len(answer(model, PROMPT, 2)) == 2


def test_a_changed_checkpoint_is_noticed_and_a_moved_one_is_found(
    fake_library: Path, tmp_path: Path, no_infinicore: None
) -> None:
    from runtime.manifest import fingerprint

    checkpoint = fakes.write_checkpoint(tmp_path / "model")
    build = fakes.write_build(tmp_path / "out", checkpoint, fake_library)
    data = fakes.manifest(checkpoint)
    data["model"]["fingerprint"] = fingerprint(checkpoint, data["weights"])
    edit_manifest(build, model=data["model"])
    with Qwen3ForCausalLM(build=build) as model:
        expected = answer(model, PROMPT, 4)
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="model.safetensors: no such file"):
        Qwen3ForCausalLM(build=build)
    with Qwen3ForCausalLM(tmp_path / "moved", build=build) as model:
        assert answer(model, PROMPT, 4) == expected
    fakes.write_checkpoint(tmp_path / "moved", {**fakes.state_dict(), "extra": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="its weight files are not those .* build it again"):
        Qwen3ForCausalLM(tmp_path / "moved", build=build)


def test_weights_of_a_build_from_onnx_come_from_the_given_folder(
    fake_library: Path, tmp_path: Path, no_infinicore: None
) -> None:
    from runtime.manifest import fingerprint

    own = fakes.write_checkpoint(tmp_path / "own")
    data = fakes.manifest(own)["model"]
    data["source"] = {"kind": "onnx", "path": str(own / "model.onnx")}
    data["fingerprint"] = fingerprint(own, fakes.manifest(own)["weights"])
    build = fakes.write_build(tmp_path / "out", own, fake_library, model=data)
    with Qwen3ForCausalLM(build=build) as model:
        expected = answer(model, PROMPT, 8)
    tuned = fakes.write_checkpoint(tmp_path / "tuned", fakes.state_dict(seed=1))
    with Qwen3ForCausalLM(tuned, build=build) as model:
        assert answer(model, PROMPT, 8) != expected
    other = fakes.write_checkpoint(tmp_path / "other", {**fakes.state_dict(), "extra": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"other: its weight files are not those .* build it again"):
        Qwen3ForCausalLM(other, build=build)
    (other / "model.safetensors").unlink()  # what is left has the tokenizer
    with Qwen3ForCausalLM(other, build=build) as model:
        assert answer(model, PROMPT, 8) == expected and model.tokenizer is not None


@pytest.mark.parametrize("asked", [None, "nvidia", DeviceType.DEVICE_TYPE_CPU])
def test_the_device_is_the_builds_own(
    fake_library: Path, tmp_path: Path, no_infinicore: None, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    class Opened(Exception):
        pass

    def engine(library: Any, meta: Any, weights: Any, device: int, dev_ids: list[int]) -> None:
        raise Opened(int(device))

    monkeypatch.setattr("runtime.qwen3.Engine", engine)
    checkpoint = fakes.write_checkpoint(tmp_path / "model")
    build = fakes.write_build(tmp_path / "out", checkpoint, fake_library, target="nvidia", device=1)
    if asked == DeviceType.DEVICE_TYPE_CPU:
        with pytest.raises(ConfigError, match="was built for device nvidia, asked for device cpu"):
            Qwen3ForCausalLM(build=build, device=asked)
        return
    with pytest.raises(Opened, match="1"):
        Qwen3ForCausalLM(build=build, device=asked)
