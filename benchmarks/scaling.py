"""What sharing a model between devices does: memory per device and communication per step, for 1, 2 and 4 devices.

    python -m benchmarks.scaling MODEL_DIR [--ndev 1 2 4] [--prompt-len 512] [--json]

Runs a prefill and decode steps of an engine on that many devices of the embedded InfiniCore. All of them are this machine's one CPU, so times say nothing about
scaling and are not printed; bytes do not depend on the device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.qwen3 import Qwen3ForCausalLM


def measure(model: Path, ndev: int, prompt_len: int, build: Path | None) -> dict[str, Any]:
    with Qwen3ForCausalLM(model, ndev=ndev, build=build, check_weights=False, kv_pool_tokens=2 * prompt_len) as engine:
        e = engine.engine
        cache = e.create_cache(0)

        def step(tokens: list[int], position: int) -> dict[str, int]:
            before = {name: e.counter(name) for name in ("collectives", "collective_bytes")}
            e.forward(tokens, [len(tokens)], [position], [cache])
            return {name: e.counter(name) - before[name] for name in before}

        prefill = step([1] * prompt_len, 0)
        step([1], prompt_len)
        decode = step([1], prompt_len + 1)
        info = e.pool_info()
        return dict(
            ndev=ndev,
            weight_bytes_per_device=e.counter("weight_bytes"),
            kv_bytes_per_token_and_device=info["bytes_per_token"] // ndev,
            collectives_per_step=decode["collectives"],
            collective_bytes_per_decode_step=decode["collective_bytes"],
            collective_bytes_per_prefill=prefill["collective_bytes"],
            prompt_len=prompt_len,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--build", type=Path, metavar="OUT")
    parser.add_argument("--ndev", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(arguments.model, n, arguments.prompt_len, arguments.build) for n in arguments.ndev]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(
        "devices  weights per device  KV per token and device  collectives per step  sent per decode step  sent per prefill"
    )
    for row in rows:
        print(
            f"{row['ndev']:7}  {row['weight_bytes_per_device'] / 1e9:15.3f} GB  {row['kv_bytes_per_token_and_device'] / 1024:19.1f} KiB  "
            f"{row['collectives_per_step']:20}  {row['collective_bytes_per_decode_step'] / 1024:16.1f} KiB  {row['collective_bytes_per_prefill'] / 2**20:12.2f} MiB"
        )


if __name__ == "__main__":
    main()
