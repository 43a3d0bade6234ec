"""What a decode step costs the host, counted in C with operators that do nothing; benchmarks/host_overhead.py prints the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.host_overhead import compile_program, measure

LAYERS = (28, 5)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[int, str], Path] = {}

    def program(layers: int, kv: str) -> Path:
        if (layers, kv) not in made:
            made[layers, kv] = compile_program(tmp_path_factory.mktemp("overhead"), layers, kv, optimise=False)
        return made[layers, kv]

    return program


@pytest.mark.parametrize("batch", [1, 7])
def test_a_paged_decode_step_in_steady_state_makes_nothing(programs, batch):
    found = measure(
        programs(28, "paged"), batch, position=1040, steps=900
    )  # the block table doubles at 1024 and at 2048
    assert found["layers"] == 28 and found["calls_per_step"] > 28 * 11
    for what in ("heap_allocations", "operators_created", "tensors_created", "device_allocations", "plans_built"):
        assert found[f"{what}_per_step"] == 0, what
    assert found["host_to_device_copies_per_step"] == 1


def test_creations_on_contiguous_caches_do_not_depend_on_the_layers(programs):
    """InfiniCore fixes the length at create: one set of operators per step, which all layers share."""
    few, many = (measure(programs(layers, "contiguous"), 1, position=1040, steps=300) for layers in sorted(LAYERS))
    assert few["layers"] < many["layers"] and few["calls_per_step"] < many["calls_per_step"]
    for what in ("operators_created", "tensors_created", "heap_allocations"):
        assert few[f"{what}_per_step"] == many[f"{what}_per_step"] > 0, what
    assert many["operators_created_per_step"] == 5  # keys and values into the cache, scores, softmax, mixture


def test_no_host_synchronisation_inside_a_step(build_engine):
    """What is launched between the inputs' copy and the result's has none; the one synchronisation ends the step."""
    for kv in ("paged", "contiguous"):
        lines = (build_engine("two", kv=kv, emit_only=True) / "qwen3.cpp").read_text().splitlines()
        start = lines.index("infiniStatus_t launchCalls(DeviceResource &rsrc, const Staging &staging) {")
        body = "\n".join(lines[start : lines.index("}", start)])
        assert "Synchronize" not in body and "infinirtMemcpy(" not in body and ".run(context" in body
