"""All eleven targets in the device simulator, against onnxruntime: float32 on contiguous caches, half precision on paged ones where the target has them, 1, 2 and 4 devices.

What each target has is written here by hand, from InfiniCore's own sources and documentation, and not read from passes/targets.json: the legaliser and the simulator
both read that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from codegen.build import build_model
from runtime.errors import InfiniCoreError
from tests.codegen.engines import Builder
from tests.codegen.simulated import RAGGED, bounds_of, build_all, compare, config, open_simulated

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "targets"


@dataclass(frozen=True)
class Facts:
    """One backend of InfiniCore."""

    device: int
    paged: bool = True
    uncertain: bool = False  # paged prefill is there but not known to work: taken only when it is asked for
    collectives: bool = True
    gathers: bool = False  # infiniccl has AllGather
    captures: bool = False  # streams can be captured
    captures_collectives: bool = (
        False  # what infiniccl queues can be captured as well, and is known to be (NCCL documents it)
    )
    add_rms_norm: bool = True


FACTS = {
    "cpu": Facts(0, paged=False, collectives=False),
    "nvidia": Facts(1, gathers=True, captures=True, captures_collectives=True),
    "cambricon": Facts(2, uncertain=True),
    "ascend": Facts(3, captures=True, add_rms_norm=False),
    "metax": Facts(4, uncertain=True, captures=True),
    "moore": Facts(5, uncertain=True),
    "iluvatar": Facts(6, gathers=True, captures=True),
    "kunlun": Facts(7, paged=False, add_rms_norm=False),
    "hygon": Facts(8, gathers=True, captures=True),
    "qy": Facts(9, paged=False, gathers=True, captures=True, add_rms_norm=False),  # its add_rms_norm is uncertain
    "ali": Facts(10, gathers=True, captures=True),
}
CASES = [(target, dtype) for target in FACTS for dtype in ("f32", "bf16")]


def form(target: str, dtype: str) -> str:
    return "paged" if dtype != "f32" and FACTS[target].paged else "contiguous"


@pytest.fixture(scope="module")
def builds(build_engine: Builder) -> dict[str, Path]:
    return build_all(build_engine, [dict(target=t, dtype=d, kv=form(t, d)) for t, d in CASES])


@pytest.mark.parametrize("ndev", [1, 2, 4])
@pytest.mark.parametrize("target, dtype", CASES)
def test_simulated_target_equals_onnxruntime(target, dtype, ndev, builds, build_engine):
    facts = FACTS[target]
    kv = form(target, dtype)
    folder = builds[f"{target}-{dtype}-{kv}"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"] == facts.device and manifest["kv"]["form"] == kv
    reference = build_engine.reference(build_engine.checkpoint(config()))
    bounds = bounds_of(build_engine, target, dtype, kv)
    if ndev > 1 and not facts.collectives:
        refusal = rf"createQwen3Model: ndev is {ndev}, but this device has no collectives: status 3 \(BAD_PARAM\)"
        with pytest.raises(InfiniCoreError, match=refusal):
            open_simulated(folder, reference, bounds, ndev)
        return
    s = open_simulated(folder, reference, bounds, ndev)
    try:
        compare(s)
        count = s.engine.counter
        assert count("h2d_copies") == count("steps")  # one copy per step, whatever is in it
        captured = facts.captures and kv == "paged" and (ndev == 1 or facts.captures_collectives)
        assert (count("graphs_captured") > 0) == (count("graphs_replayed") > 0) == captured
        # Two sums per layer, and where the vocabulary is cut one gathering, in every step: as calls or in a replayed graph.
        assert count("collectives") == (0 if ndev == 1 else count("steps") * (2 * 3 + facts.gathers))
    finally:
        s.engine.close()


@pytest.mark.parametrize("target", FACTS)
def test_two_devices_hold_half_each(target, builds, build_engine):
    """Weights that are cut are held once by all devices together; norms and the embedding by each."""
    facts = FACTS[target]
    if not facts.collectives:
        return
    folder = builds[f"{target}-f32-contiguous"]
    reference = build_engine.reference(build_engine.checkpoint(config()))
    held = {}
    for ndev in (1, 2):
        s = open_simulated(folder, reference, bounds_of(build_engine, target, "f32", "contiguous"), ndev)
        held[ndev] = s.engine.counter("weight_bytes")
        s.engine.close()
    c = config()
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    cut = 3 * hidden * ((2 * heads + 2 * kv) * dim + 3 * inner)  # per layer: q, k, v, o and gate, up, down
    whole = 3 * (2 * hidden + 2 * dim) + hidden + c["vocab_size"] * hidden  # norms, and the embedding, which is tied
    assert held[1] == 4 * (cut + whole)
    assert held[2] == 4 * (cut // 2 + whole)


@pytest.mark.parametrize("target", FACTS)
def test_op_sequence_of_one_layer(target, build_engine, tmp_path, request):
    """Renew: ``pytest tests/codegen/test_targets_simulated.py --renew-golden``, then read the diff."""
    text = ""
    for dtype in ("f32", "bf16"):
        folder = tmp_path / dtype
        kv = form(target, dtype)
        build_model(
            model=build_engine.checkpoint(config()), out=folder, target=target, dtype=dtype, kv=kv, simulate=True, emit_only=True
        )  # fmt: skip
        manifest = json.loads((folder / "manifest.json").read_text())
        lines = (folder / "qwen3.cpp").read_text().splitlines()
        start = lines.index("// The calls of one layer:") + 1
        calls = [line[2:].rstrip() for line in lines[start : lines.index("//", start)]]
        text += f"{target} in {dtype}, {manifest['kv']['form']} caches, decode steps {'captured' if manifest['capture'] else 'as calls'}\n"
        text += "\n".join(calls) + "\n"
        for which in ("Decode", "Prefill"):  # of one request on a contiguous cache
            starts = [i for i, line in enumerate(lines) if line.startswith(f"infiniStatus_t attend{which}(")]
            for at in starts:
                body = lines[at : lines.index("}", at)]
                text += f" {which.lower()}\n" + "".join(
                    f"   {b.strip()[3:]}\n" for b in body if b.strip().startswith("// ")
                )
        for op, name, why, _ in manifest["legalised"]:
            text += f"  {op}: {name}" + (f" ({why})" if why else "") + "\n"
        assert ("add_rms_norm(" in "\n".join(calls)) == FACTS[target].add_rms_norm
        assert ("paged_attention_ragged(" in "\n".join(calls)) == (kv == "paged")
        assert ("all_reduce(" in "\n".join(calls)) == FACTS[target].collectives
    golden = GOLDEN / f"{target}.txt"
    if request.config.getoption("--renew-golden", default=False):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == (golden.read_text() if golden.is_file() else "")


@pytest.mark.parametrize("target", [t for t, f in FACTS.items() if f.uncertain])
def test_uncertain_ops_are_left_alone_unless_asked_for(target, build_engine, tmp_path):
    checkpoint = build_engine.checkpoint(config())
    build_model(model=checkpoint, out=tmp_path / "b", target=target, dtype="bf16", simulate=True, emit_only=True)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["kv"]["form"] == "contiguous"


def test_the_batch_reaches_over_blocks():
    """What the comparison runs crosses the ends of blocks of 16 tokens, in prefill and in decode."""
    assert any(start < 16 < start + n for start, n in RAGGED) and any(
        start % 16 == 15 and n == 1 for start, n in RAGGED
    )
