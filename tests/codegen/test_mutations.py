"""Mistakes that are easy to make, planted one at a time in an emitted engine: the comparison with onnxruntime must catch each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen.build import headers
from codegen.calls import CALLS, OLDER
from codegen.toolchain import compile_engine
from runtime.errors import InfiniCoreError
from runtime.infinicpu.simulator import last_violation
from tests.codegen.engines import Builder
from tests.codegen.simulated import Bounds, Comparison, bounds_of, build_all, compare, config, open_simulated
from tests.models import relative_l2

# f32 has the tightest bound; bf16 where the target has paged caches in half precision alone. Wrong results are off by far more than either.
PAGED = dict(target="nvidia", dtype="bf16", kv="paged")
CONTIGUOUS = dict(target="nvidia", dtype="f32", kv="contiguous")


# The comparison's first step of all.
WRONG_FROM_THE_START = r"^prefill, row \d+ of 102: relative L2"


@pytest.fixture(scope="module")
def builds(build_engine: Builder) -> dict[str, Path]:
    return build_all(build_engine, [PAGED, CONTIGUOUS])


@pytest.fixture
def check(builds, build_engine: Builder, tmp_path: Path) -> Callable[..., float]:
    """``check(options, old, new, ndev=1)``: compare an engine in whose source every ``old`` became ``new``."""

    def run(options: dict[str, str], old: str = "", new: str = "", ndev: int = 1) -> float:
        folder = builds["-".join(options.values())]
        if old:
            shutil.copytree(folder, tmp_path / "mutant")
            folder = tmp_path / "mutant"
            source = (folder / "qwen3.cpp").read_text()
            assert old in source
            (folder / "qwen3.cpp").write_text(source.replace(old, new))
            compile_engine(folder, headers("embedded"), optimise=False)
        reference = build_engine.reference(build_engine.checkpoint(config()))
        s = open_simulated(folder, reference, bounds_of(build_engine, **options), ndev)
        try:
            return compare(s)
        finally:
            s.engine.close()

    return run


@pytest.mark.parametrize("options, ndev", [(PAGED, 1), (PAGED, 2), (CONTIGUOUS, 2)], ids=str)
def test_nothing_planted_nothing_found(check, options, ndev):
    check(options, ndev=ndev)


def test_swapped_swiglu_operands_are_caught(check):
    with pytest.raises(AssertionError, match=WRONG_FROM_THE_START):
        check(CONTIGUOUS, "s.ffn, s.gate_up + I * ELEM, s.gate_up", "s.ffn, s.gate_up, s.gate_up + I * ELEM")


def test_swapped_sin_and_cos_are_caught(check):
    with pytest.raises(AssertionError, match=WRONG_FROM_THE_START):
        old = "rsrc.sin_table->data(), rsrc.cos_table->data()"
        check(CONTIGUOUS, old, "rsrc.cos_table->data(), rsrc.sin_table->data()")


def test_the_old_order_of_add_rms_norm_is_caught(check):
    """The call in the order that it had before 2026-02-13: residual_out last. The norm's weight is where a whole buffer should be."""
    assert OLDER["infini.add_rms_norm"][0].call == ("o0", "i0", "i1", "i2", "o1")
    old = "s.ffn_norm_out, s.hidden, s.hidden, s.o, rsrc.ffn_norm[layer]->data()"
    with pytest.raises(InfiniCoreError, match=r"infiniopAddRMSNorm \(ffn_norm_out\): status 3 \(BAD_PARAM\)"):
        check(CONTIGUOUS, old, "s.ffn_norm_out, s.hidden, s.o, rsrc.ffn_norm[layer]->data(), s.hidden")
    assert re.fullmatch(r"nvidia: add_rms_norm: operand 3 .* is not inside one allocation .*", last_violation(None))


def test_the_old_order_of_paged_caching_is_caught(check):
    """Create and call in the order that they had before 2026-01-12: k, v, then the caches. A step's keys are where the pool should be."""
    assert CALLS["infini.paged_caching"].call == ("o0", "o1", "i2", "i3", "i4")
    old = (
        "rsrc.kv.keys(layer), rsrc.kv.values(layer), s.qk_rope_norm + 128 * G * ELEM, s.qkv + 192 * G * ELEM, in.slots"
    )
    new = (
        "s.qk_rope_norm + 128 * G * ELEM, s.qkv + 192 * G * ELEM, rsrc.kv.keys(layer), rsrc.kv.values(layer), in.slots"
    )
    with pytest.raises(InfiniCoreError, match=r"infiniopPagedCaching \(k_cache_out\): status 3 \(BAD_PARAM\)"):
        check(PAGED, old, new)
    assert re.fullmatch(r"nvidia: paged_caching: operand 0 .* is not inside one allocation .*", last_violation(None))


def test_a_dropped_all_reduce_is_caught(check):
    with pytest.raises(AssertionError, match=WRONG_FROM_THE_START):
        check(CONTIGUOUS, 'QWEN3_TRY(allReduce(rsrc, "down_sum", s.down, 96 * T));', "", ndev=2)


def test_a_wrong_block_table_is_caught(check):
    with pytest.raises(AssertionError, match=WRONG_FROM_THE_START):
        check(PAGED, "b < cache.blocks.size() ? static_cast<int32_t>(cache.blocks[b])", "b < cache.blocks.size() ? static_cast<int32_t>(cache.blocks[0])")  # fmt: skip


def test_a_stale_graph_input_is_caught(check):
    """Inputs that do not reach the captured graph: the third step of a shape is its first replay, and gets those of the second."""
    old = "    QWEN3_CHECK(infinirtMemcpyAsync(rsrc.inputs.data(), staging.inputs.data()"
    with pytest.raises(AssertionError, match=r"^decode step 2, row \d of 8: relative L2"):
        check(PAGED, old, "    if (!rsrc.plan->captured.exec)\n    " + old)


def test_a_graph_that_outlives_its_memory_is_caught(check):
    """A captured step that is replayed although its buffers were allocated anew: the simulator sees memory that is gone."""
    old = "if (captured.exec && captured.allocations != rsrc.counters.device_allocations) {"
    new = old.replace("captured.exec &&", "false && captured.exec &&")
    with pytest.raises(InfiniCoreError, match=r"infinirtMemcpyAsync \(logits\): status 3 \(BAD_PARAM\)"):
        check(PAGED, old, new)
    assert re.fullmatch(r"nvidia: \w+: operand \d+ is freed memory", last_violation(None))


def test_one_wrong_row_among_many_is_caught():
    """A row whose error is twice its bound, beside rows without any: all of them together are within the bound of many."""
    bounds = Bounds(pooled=0.02, row=0.04)
    expected = np.random.default_rng(3).standard_normal((45, 212)).astype(np.float32)
    found = expected.copy()
    found[31] *= 1 + 2 * bounds.row
    assert relative_l2(found, expected) < bounds.pooled
    Comparison(bounds).check(expected, expected, "decode step 4")
    with pytest.raises(AssertionError, match=r"^decode step 4, row 31 of 45: relative L2 8.00e-02, bound 4.00e-02"):
        Comparison(bounds).check(found, expected, "decode step 4")
    found[31, 7] = np.nan
    with pytest.raises(AssertionError, match=r"^decode step 4, row 31 of 45: relative L2 nan"):
        Comparison(bounds).check(found, expected, "decode step 4")


def test_many_slightly_wrong_rows_are_caught():
    """Every row within the bound of a row, all of them beyond the bound of many: in steps of few rows as in one."""
    bounds = Bounds(pooled=0.02, row=0.04)
    expected = np.random.default_rng(3).standard_normal((45, 212)).astype(np.float32)
    found = expected * np.float32(1.03)
    with pytest.raises(AssertionError, match="^prefill, 45 rows: relative L2 3.00e-02, bound 2.00e-02"):
        Comparison(bounds).check(found, expected, "prefill")
    comparison = Comparison(bounds)
    for start in range(0, 45, 9):
        comparison.check(found[start : start + 9], expected[start : start + 9], "decode")
    with pytest.raises(AssertionError, match="^all steps of few rows, 45 rows: relative L2 3.00e-02, bound 2.00e-02"):
        comparison.finish()
