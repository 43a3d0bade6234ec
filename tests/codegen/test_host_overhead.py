"""What a decode step costs the host, counted in C with operators that do nothing; benchmarks/host_overhead.py prints the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.host_overhead import compile_program, measure
from tests.codegen.faulty import FAULTY, Faults, faulty_builds
from tests.codegen.simulated import DEVICE_IDS, Bounds, config, open_simulated

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


# Whatever makes the host wait for a device; on real devices taking and freeing memory does so too.
WAITS = (
    "infinirtStreamSynchronize",
    "infinirtDeviceSynchronize",
    "infinirtEventSynchronize",
    "infinirtMemcpy",
    "infinirtMalloc",
    "infinirtMallocHost",
    "infinirtFree",
    "infinirtFreeHost",
)


@pytest.mark.parametrize("new", [1, 3], ids=["decode", "pieces"])
@pytest.mark.parametrize("ndev", [1, 2])
@pytest.mark.parametrize("kv", FAULTY)
def test_a_step_waits_for_each_device_once(kv, ndev, new, build_engine):
    """Counted between the engine and InfiniCore: in steady state one synchronisation of its stream per device and step, whichever way the step is launched, and
    nothing else that waits; the inputs' copy goes to every device, the sampled tokens' comes from the first."""
    build = faulty_builds(build_engine)[kv]
    faults = Faults(build)
    s = open_simulated(build, build_engine.reference(build_engine.checkpoint(config())), Bounds(0.0, 0.0), ndev)
    devices = DEVICE_IDS[:ndev] if ndev > 1 else [0]
    names = (*WAITS, "infinirtMemcpyAsync", "infinirtGraphLuanch")

    def infer(at: int) -> None:
        s.engine.infer([7] * 2 * new, [new] * 2, [at, at], caches, [1.0] * 2, [1] * 2, [1.0] * 2, [0.5] * 2)

    def counts() -> dict[tuple[str, int], int]:
        return {(name, device): faults.count(name, device) for name in names for device in devices}

    steps = range(80, 100, new)
    with s.engine:
        caches = [s.engine.create_cache(120) for _ in range(2)]
        s.engine.forward([5] * 2 * steps.stop, [steps.stop] * 2, [0, 0], caches)
        for at in (100, 100, 100):  # the largest of all, so that memory suffices; captured where that is possible
            infer(at)
        before = counts()
        for at in steps:
            infer(at)
        per_step = {key: (n - before[key]) / len(steps) for key, n in counts().items()}
    expected = dict.fromkeys(per_step, 0)
    for device in devices:
        expected["infinirtStreamSynchronize", device] = 1
        expected["infinirtMemcpyAsync", device] = 2 if device == devices[0] else 1
        expected["infinirtGraphLuanch", device] = int(kv == "paged" and new == 1)
    assert per_step == expected
