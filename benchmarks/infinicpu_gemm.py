"""Speed of the embedded InfiniCore's gemm on a weight stored [N, K].

    python -m benchmarks.infinicpu_gemm [--rows 1 8 128 512] [--n 6144] [--k 2048] [--threads 2] [--json FILE]

For each dtype and number of rows M: the best and the median time of a call, GFLOP/s, and GB/s of weights read. Several
copies of the weight are used in turn, so that a call reads it from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from ir.errors import run_cli
from runtime.infinicpu import build

DTYPES = {
    "f32": (np.dtype(np.float32), 13),
    "f16": (np.dtype(np.float16), 12),
    "bf16": (np.dtype(ml_dtypes.bfloat16), 19),
}
# The weights' copies together are at least this large: more than the caches of common machines.
WORKING_SET = 192 << 20


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"InfiniCore call failed with status {status}")


def tensor(lib: ctypes.CDLL, shape: Sequence[int], strides: Sequence[int], code: int) -> ctypes.c_void_p:
    desc = ctypes.c_void_p()
    n = len(shape)
    check(
        lib.infiniopCreateTensorDescriptor(
            ctypes.byref(desc),
            ctypes.c_size_t(n),
            (ctypes.c_size_t * n)(*shape),
            (ctypes.c_ssize_t * n)(*strides),
            code,
        )
    )
    return desc


def measure(
    lib: ctypes.CDLL, handle: ctypes.c_void_p, name: str, m: int, n: int, k: int, seconds: float
) -> dict[str, object]:
    dtype, code = DTYPES[name]
    copies = max(1, -(-WORKING_SET // (n * k * dtype.itemsize))) if m < 64 else 1
    rng = np.random.default_rng(0)
    first = rng.standard_normal((n, k), dtype=np.float32).astype(dtype)
    weights = [first, *(first.copy() for _ in range(copies - 1))]
    a, c = rng.standard_normal((m, k), dtype=np.float32).astype(dtype), np.zeros((m, n), dtype)
    descs = [tensor(lib, *t, code) for t in (((m, n), (n, 1)), ((m, k), (k, 1)), ((k, n), (1, k)))]
    op, size = ctypes.c_void_p(), ctypes.c_size_t()
    check(lib.infiniopCreateGemmDescriptor(handle, ctypes.byref(op), *descs))
    check(lib.infiniopGetGemmWorkspaceSize(op, ctypes.byref(size)))
    workspace = np.zeros(size.value + 1, np.uint8)
    alpha, beta = ctypes.c_float(1), ctypes.c_float(0)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        weight = weights[len(times) % copies]
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (workspace, c, a, weight)]
        start = time.perf_counter()
        status = lib.infiniopGemm(op, pointers[0], size, *pointers[1:], alpha, beta, None)
        times.append(time.perf_counter() - start)
        check(status)
    check(lib.infiniopDestroyGemmDescriptor(op))
    for desc in descs:
        check(lib.infiniopDestroyTensorDescriptor(desc))
    best, median = min(times[1:]), statistics.median(times[1:])
    return {
        **{"dtype": name, "m": m, "n": n, "k": k, "best_ms": best * 1e3, "median_ms": median * 1e3},
        **{"gflops": 2e-9 * m * n * k / best, "weight_gbs": 1e-9 * n * k * dtype.itemsize / best},
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128, 512])
    parser.add_argument("--n", type=int, default=6144)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--threads", type=int, help="default: all of the process's CPUs")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args(argv)
    root = build()
    ctypes.CDLL(str(root / "lib" / "libinfinirt.so"), mode=ctypes.RTLD_GLOBAL)
    lib = ctypes.CDLL(str(root / "lib" / "libinfiniop.so"))
    lib.infinicpuIsa.restype = ctypes.c_char_p
    if args.threads:
        check(lib.infinicpuSetNumThreads(args.threads))
    threads, handle = ctypes.c_int(), ctypes.c_void_p()
    check(lib.infinicpuGetNumThreads(ctypes.byref(threads)))
    check(lib.infiniopCreateHandle(ctypes.byref(handle)))
    isa = lib.infinicpuIsa().decode()
    print(f"C[M, {args.n}] = A[M, {args.k}] W^T, {threads.value} threads, {isa}")
    print(f"{'dtype':>6} {'M':>5} {'best ms':>9} {'median':>9} {'GFLOP/s':>9} {'GB/s':>7}")
    results = []
    for name in args.dtypes:
        for m in args.rows:
            r = measure(lib, handle, name, m, args.n, args.k, args.seconds)
            results.append(r)
            print(
                f"{name:>6} {m:5} {r['best_ms']:9.3f} {r['median_ms']:9.3f} {r['gflops']:9.1f} {r['weight_gbs']:7.1f}"
            )
    check(lib.infiniopDestroyHandle(handle))
    if args.json:
        args.json.write_text(json.dumps({"isa": isa, "threads": threads.value, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
