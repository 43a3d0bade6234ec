"""``python -m runtime.bench``: how fast an engine is, and how much of this machine that is."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime import infinicore
from runtime.errors import ConfigError, Parser, run_cli
from runtime.generate import add_model_arguments, model_arguments
from runtime.kvcache import KVCache
from runtime.probe import arithmetic_peak, memory_bandwidth
from runtime.qwen3 import Qwen3ForCausalLM
from runtime.weights import kv_bytes_per_token, matrix_flops_per_token

_DESCRIPTION = """Measure prefill and decode speed, and compare them with what this machine measures for itself.

Each of --repeat rounds runs the memory and arithmetic probes, a prefill of --batch prompts with --prompt-len random
tokens, and --gen-len greedy decode steps on top. Reported are medians, with the smallest and largest value.

  prefill_tok_s              prompt tokens per second, all requests together
  decode_tok_s               generated tokens per second, all requests together
  ttft_ms                    time to the first token: the whole prefill and one sampled token
  load_s                     from the command to a model that can answer (a build that has to be made first not counted)
  peak_rss_bytes             most resident memory of this process, mapped weights included
  host_us_per_step           a decode step with every operator of the embedded InfiniCore left out: the engine's and
                             Python's own time; null with another InfiniCore
  membw_gb_s, matmul_gflop_s what the probes reached with as many threads
  decode_share_of_bandwidth  (weights + KV cache read per step) / step time / membw_gb_s
  prefill_share_of_peak      multiply-adds of the prefill / its time / matmul_gflop_s
"""


_PROMPT_LEN, _GEN_LEN = 512, 32


@dataclass
class _Samples:
    """One value per round."""

    prefill_tok_s: list[float] = field(default_factory=list)
    decode_tok_s: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    membw_gb_s: list[float] = field(default_factory=list)
    matmul_gflop_s: list[float] = field(default_factory=list)
    host_us_per_step: list[float] = field(default_factory=list)


class _Batch:
    """Requests of equal length over the bare engine; every step is greedy and none ends early."""

    def __init__(self, model: Qwen3ForCausalLM, size: int, seed: int) -> None:
        self.model, self.size, self.length = model, size, 0
        self.random = np.random.default_rng(seed)
        self.caches = [KVCache(model) for _ in range(size)]

    def _infer(self, tokens: np.ndarray) -> np.ndarray:
        count = tokens.shape[1]
        ones = np.ones(self.size)
        out = self.model.engine.infer(
            tokens.reshape(-1),
            np.full(self.size, count),
            np.full(self.size, self.length),
            [cache.data() for cache in self.caches],
            ones,
            ones,
            ones,
            ones * 0.5,
        )
        self.length += count
        return out

    def prefill(self, length: int) -> np.ndarray:
        """Random prompts, in pieces as the model computes them."""
        tokens = self.random.integers(0, self.model.vocab_size(), (self.size, length))
        step = max(1, self.model.prefill_chunk // self.size)
        for start in range(0, length, step):
            out = self._infer(tokens[:, start : start + step])
        return out

    def decode(self, first: np.ndarray) -> np.ndarray:
        return self._infer(first.reshape(self.size, 1))

    def close(self) -> None:
        for cache in self.caches:
            cache.drop()


def _prefill_flops(model: Qwen3ForCausalLM, prompt: int, batch: int) -> float:
    """Multiplications and additions: the layers' matrices, attention over the causal half, lm_head of one row each."""
    meta = model.meta
    attention = 4.0 * meta.nlayer * meta.nh * meta.dh * prompt * (prompt + 1) / 2
    return batch * (prompt * matrix_flops_per_token(meta) + attention + 2.0 * meta.d * meta.dvoc)


def _measure(model: Qwen3ForCausalLM, args: argparse.Namespace, threads: int, samples: _Samples) -> None:
    samples.membw_gb_s.append(memory_bandwidth(threads))
    samples.matmul_gflop_s.append(arithmetic_peak(threads, model.build.data["dtype"]))
    batch = _Batch(model, args.batch, seed=len(samples.ttft_ms))
    try:
        started = time.perf_counter()
        token = batch.prefill(args.prompt_len)
        first = time.perf_counter()
        for _ in range(args.gen_len):
            token = batch.decode(token)
        ended = time.perf_counter()
        samples.ttft_ms.append(1000 * (first - started))
        samples.prefill_tok_s.append(args.batch * args.prompt_len / (first - started))
        samples.decode_tok_s.append(args.batch * args.gen_len / (ended - first))
        if infinicore.is_embedded():
            infinicore.set_noop(True)
            try:
                constant = np.zeros(args.batch, np.uint32)  # nothing is computed: what comes back is no token
                batch.length = args.prompt_len
                started = time.perf_counter()
                for _ in range(args.gen_len):
                    batch.decode(constant)
                samples.host_us_per_step.append(1e6 * (time.perf_counter() - started) / args.gen_len)
            finally:
                infinicore.set_noop(False)
    finally:
        batch.close()


def _fit_lengths(args: argparse.Namespace, context: int) -> None:
    """Defaults that fit into the context; ConfigError when the lengths that were asked for do not."""
    if args.gen_len is None:
        room = context // 2 if args.prompt_len is None else context - args.prompt_len
        args.gen_len = max(1, min(_GEN_LEN, room))
    if args.prompt_len is None:
        args.prompt_len = max(1, min(_PROMPT_LEN, context - args.gen_len))
    needed = args.prompt_len + args.gen_len
    if needed > context:
        raise ConfigError(f"--prompt-len and --gen-len are {needed} tokens, the context is {context}")


def _make_room(model: Qwen3ForCausalLM, args: argparse.Namespace) -> None:
    """Let the pool of paged caches hold the whole batch; contiguous ones grow by themselves."""
    kv = model.build.data["kv"]
    if kv["form"] != "paged":
        return
    block = kv["block_size"]
    each = -(-(args.prompt_len + args.gen_len) // block) * block
    # Not below the engine's own default, so that small runs measure what is in use.
    model.engine.set_pool_size(max(args.batch * each, model.build.data["meta"]["dctx"], 8192))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, measure, and return the report."""
    for name in ("prompt_len", "gen_len", "batch", "repeat"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    started = time.perf_counter()
    with Qwen3ForCausalLM(**model_arguments(args), prefill_chunk=args.prefill_chunk) as model:
        _fit_lengths(args, model.max_context_len())
        _make_room(model, args)
        model.engine.set_capture(not args.no_capture)
        wall_s = time.perf_counter() - started
        about = infinicore.description()
        threads = int(about.get("threads") or args.threads or 1)
        warm = _Batch(model, args.batch, seed=12345)  # plans, pages and threads: once, before anything is timed
        warm.decode(warm.prefill(args.prompt_len))
        warm.close()
        samples = _Samples()
        for _ in range(args.repeat):
            _measure(model, args, threads, samples)
        report: dict[str, Any] = {}
        for name, values in vars(samples).items():
            report[name] = round(statistics.median(values), 4) if values else None
        report["load_s"] = round(model.load_seconds, 4)
        report["peak_rss_bytes"] = peak_resident_bytes()
        kv_dtype = model.build.data["kv"]["dtype"]
        context = args.prompt_len + args.gen_len / 2
        step_bytes = model.weight_bytes_per_token + args.batch * context * kv_bytes_per_token(model.meta, kv_dtype)
        steps_s = report["decode_tok_s"] / args.batch
        flops = _prefill_flops(model, args.prompt_len, args.batch)
        report["decode_share_of_bandwidth"] = round(step_bytes * steps_s / 1e9 / report["membw_gb_s"], 4)
        report["prefill_share_of_peak"] = round(flops / (report["ttft_ms"] * 1e6) / report["matmul_gflop_s"], 4)
        report["spread"] = {name: [round(min(v), 4), round(max(v), 4)] for name, v in vars(samples).items() if v}
        data = model.build.data
        report["settings"] = {
            "model": str(model.build.source),
            "build": str(model.build.folder),
            "target": data["target"],
            "dtype": data["dtype"],
            "quant": data.get("quant", "none"),
            "kv": data["kv"],
            "prompt_len": args.prompt_len,
            "gen_len": args.gen_len,
            "batch": args.batch,
            "repeat": args.repeat,
            "captured_steps": model.engine.counter("graphs_replayed") > 0,
            "prefill_chunk": args.prefill_chunk,
            "weight_bytes": model.weight_bytes,
            "build_and_load_s": round(wall_s, 4),
            **about,
        }
    return report


def _print_table(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(
        f"{settings['model']}  {settings['dtype']}  {settings['target']}  "
        f"{settings.get('threads', '?')} threads  {settings.get('isa', '')}"
    )
    units = {
        "prefill_tok_s": f"tokens/s   prompt of {settings['prompt_len']}, batch {settings['batch']}",
        "decode_tok_s": f"tokens/s   {settings['gen_len']} steps",
        "ttft_ms": "ms",
        "host_us_per_step": "us",
        "membw_gb_s": "GB/s",
        "matmul_gflop_s": "GFLOP/s",
    }
    for name, unit in units.items():
        if report[name] is None:
            print(f"{name:26} {'-':>12}")
            continue
        low, high = report["spread"][name]
        print(f"{name:26} {report[name]:12.2f} {unit}  ({low:.2f} to {high:.2f})")
    print(f"{'load_s':26} {report['load_s']:12.2f} s")
    print(f"{'peak_rss_bytes':26} {report['peak_rss_bytes'] / 2**20:12.1f} MiB")
    for name in ("decode_share_of_bandwidth", "prefill_share_of_peak"):
        print(f"{name:26} {100 * report[name]:12.1f} %")


def peak_resident_bytes() -> int:
    """Peak resident memory of this process. VmHWM where there is a /proc: ru_maxrss would count the process that started this one."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m runtime.bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt-len",
        type=int,
        metavar="N",
        help=f"tokens per prompt (default: {_PROMPT_LEN}, or what the context has)",
    )
    parser.add_argument(
        "--gen-len", type=int, metavar="N", help=f"decode steps (default: {_GEN_LEN}, or what the context has)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens per engine call (default: 512)"
    )
    parser.add_argument(
        "--no-capture",
        action="store_true",
        help="run decode steps as calls where they would be replayed as captured graphs",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    report = run(args)
    if args.json:
        print(json.dumps(report))
    else:
        _print_table(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
