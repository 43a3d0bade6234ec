"""What an engine costs the host: decode steps with operators that do nothing, measured in C.

    python -m benchmarks.host_overhead [--layers 28] [--kv paged|contiguous] [--batch 1 4 16] [--position 1040] [--json]

Compiles an engine of Qwen3-1.7B's shape (no weights are needed) and host_overhead.cpp, and runs inferBatch on the embedded InfiniCore: time from its entry to its
return (median), heap allocations, descriptors and device allocations per step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import config_of
from codegen.build import build_model
from codegen.toolchain import compiler
from runtime import infinicpu

SOURCE = Path(__file__).with_name("host_overhead.cpp")


def compile_program(folder: Path, layers: int, kv: str, optimise: bool = True) -> Path:
    """The measuring program of an engine; everything lies in ``folder``. Not optimised it compiles faster, for counting."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config_of("1.7B", layers)))
    sources = build_model(model=model, out=folder / "engine", kv=kv, config_only=True, emit_only=True)
    root = infinicpu.build()
    program = folder / "host_overhead"
    command = [
        compiler(),
        "-std=c++17",
        "-O3" if optimise else "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{sources}",
        "-isystem",
    ]
    command += [f"{root}/include", str(SOURCE), str(sources / "qwen3.cpp"), "-o", str(program), f"-L{root}/lib"]
    command += [f"-Wl,-rpath,{root}/lib", "-linfiniop", "-linfinirt", "-linfiniccl", "-lpthread"]
    subprocess.run(command, check=True)
    return program


def measure(program: Path, batch: int, position: int, steps: int = 900) -> dict[str, Any]:
    done = subprocess.run(
        [str(program), str(batch), str(position), str(steps)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kv", choices=("paged", "contiguous"), default="paged")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--position", type=int, default=1040, help="tokens in each cache when measuring starts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwen3-overhead-") as folder:
        program = compile_program(Path(folder), arguments.layers, arguments.kv)
        rows = [dict(kv=arguments.kv, **measure(program, batch, arguments.position)) for batch in arguments.batch]
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['layers']} layers, {row['kv']}, batch {row['batch']}: {row['us_median']} us per step (p10 {row['us_p10']}, p90 {row['us_p90']}), "
            f"{row['calls_per_step']:g} calls, {row['heap_allocations_per_step']:g} heap allocations, {row['operators_created_per_step']:g} operators and "
            f"{row['tensors_created_per_step']:g} tensor descriptors created, {row['device_allocations_per_step']:g} device allocations"
        )


if __name__ == "__main__":
    main()
