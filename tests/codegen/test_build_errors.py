"""What a build answers to bad input: one line that names it, status 2, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from codegen.build import build_model
from ir.errors import BuildError, CheckpointError, ConfigError, GraphError, UnsupportedError, run_cli
from runtime.manifest import read_build
from runtime.qwen3 import Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codegen", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or [p.name for p in folder.iterdir()] == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), "COMMAND"),
        (("build",), "--target"),
        (("build", "--target", "abacus"), "abacus"),
        (("build", "--target", "cpu", "--max-context", "0"), "--max-context"),
        (("build", "--target", "cpu", "--model", "a", "--onnx", "b"), "not allowed with"),
        (("build", "--target", "cpu", "--model", "no/such/folder"), "no/such/folder"),
        (("build", "--target", "cpu", "--onnx", "no/such.onnx"), "no/such.onnx"),
        (("build", "--target", "cpu", "--model", TINY, "--quant", "int3"), "--quant int3"),
        (("build", "--target", "cpu", "--model", TINY, "--simulate", "--infinicore", "any"), "--simulate"),
        (("build", "--target", "kunlun", "--model", TINY, "--kv", "paged"), "kunlun has no paged_caching"),
        (("build", "--target", "cpu", "--model", TINY, "--infinicore", "no/such/root"), "no/such/root"),
    ],
)
def test_bad_arguments(arguments, expected, tmp_path):
    out = ["-o", tmp_path / "out"] if "build" in arguments else []
    assert expected in one_line(command(*arguments, *out))
    assert nothing_left(tmp_path)


def test_no_compiler(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    done = command("build", "--target", "cpu", "--model", TINY, "-o", tmp_path / "out", PATH=str(empty), CXX="")
    assert "no C++ compiler: install g++" in one_line(done)
    assert not (tmp_path / "out").exists()
    named = command("build", "--target", "cpu", "--model", TINY, "-o", tmp_path / "out", CXX="no-such-compiler")
    assert "no-such-compiler" in one_line(named)


def test_sources_are_written_without_a_compiler(tmp_path):
    done = command("build", "--target", "cpu", "--model", TINY, "-o", tmp_path / "out", "--emit-only", PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "qwen3.cpp").is_file()


def test_a_compiler_that_fails(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *qwen3.cpp*) echo "qwen3.cpp:1: error: out of cheese" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    broken.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(broken))
        with pytest.raises(BuildError, match="compiling the engine failed: .*out of cheese"):
            # compiled against an InfiniCore's headers, so that only the engine meets the broken compiler
            from runtime.infinicpu import build

            patch.delenv("CXX")
            root = build()
            patch.setenv("CXX", str(broken))
            build_model(model=TINY, out=tmp_path / "out", infinicore=str(root))
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g++"]


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        build_model(model=TINY, out=file / "below", emit_only=True)
    with pytest.raises(BuildError, match="is not a folder"):
        build_model(model=TINY, out=file, emit_only=True)
    with pytest.raises(BuildError, match="cannot be written"):
        build_model(model=TINY, out=Path("/proc/qwen3-build"), emit_only=True)


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(BuildError, match="not empty and holds no earlier build"):
        build_model(model=TINY, out=tmp_path / "out", emit_only=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_interrupted_build_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "out"
    build_model(model=TINY, out=out, emit_only=True)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    marker = tmp_path / "compiling"
    slow = tmp_path / "slow" / "g++"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *qwen3.cpp*) touch {marker}; exec sleep 60;; esac\nexec /usr/bin/env g++ "$@"\n'
    )
    slow.chmod(0o755)
    from runtime.infinicpu import build

    root = build()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "codegen",
            "build",
            "--target",
            "cpu",
            "--model",
            str(TINY),
            "-o",
            str(out),
            "--infinicore",
            str(root),
        ],
        cwd=ROOT,
        env={**os.environ, "CXX": str(slow)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    for _ in range(600):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the whole group
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.strip().splitlines()[-1] == "interrupted"
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compiling", "out", "slow"]


def test_two_builds_at_once(tmp_path):
    errors: list[BaseException] = []

    def run(context: int) -> None:
        try:
            for _ in range(6):
                build_model(model=TINY, out=tmp_path / "out", emit_only=True, max_context=context)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in (64, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    context = read_build(tmp_path / "out").data["meta"]["dctx"]
    assert f"constexpr uint32_t DCTX = {context};" in (tmp_path / "out" / "qwen3.cpp").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_context_beyond_the_models(tmp_path):
    with pytest.raises(ConfigError, match="--max-context 513: expected 1 to 512"):
        build_model(model=TINY, out=tmp_path / "out", max_context=513, emit_only=True)


def test_both_or_neither_source(tmp_path):
    for sources in ({}, {"model": TINY, "onnx": tmp_path / "model.onnx"}):
        with pytest.raises(ConfigError, match="either a model folder or an ONNX file"):
            build_model(out=tmp_path / "out", **sources)


def test_a_build_without_weights_says_so(tmp_path):
    out = build_model(model=TINY, out=tmp_path / "out", config_only=True, emit_only=True)
    with pytest.raises(BuildError, match="emit-only|not compiled"):
        Qwen3ForCausalLM(None, build=out)


def test_a_truncated_checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        build_model(model=folder, out=tmp_path / "out", emit_only=True)


def test_a_file_that_is_no_onnx(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x00\x01 not a model")
    with pytest.raises(GraphError, match="model.onnx"):
        build_model(onnx=file, out=tmp_path / "out", emit_only=True)


def test_running_out_of_memory_is_one_line(capsys):
    def main(argv: object) -> int:
        raise MemoryError

    assert run_cli(main, []) == 2
    assert capsys.readouterr().err == "error: out of memory\n"


def test_no_target_is_silently_another(tmp_path):
    with pytest.raises(UnsupportedError, match="ascend"):
        build_model(model=TINY, out=tmp_path / "out", target="ascend", kv="paged", dtype="f32", emit_only=True)
