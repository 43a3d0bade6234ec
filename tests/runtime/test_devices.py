"""A model shared by several devices, through the Python interface, on the embedded InfiniCore."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codegen.build import build_model
from runtime.errors import ConfigError
from runtime.qwen3 import InferTask, Qwen3ForCausalLM
from tests.models import relative_l2

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [44], list(range(20, 53))]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("devices")
    return {
        kv: build_model(model=TINY, out=root / kv, dtype="f32", kv=kv, optimise=False) for kv in ("paged", "contiguous")
    }


def greedy(model: Qwen3ForCausalLM, steps: int) -> list[list[int]]:
    tasks = [InferTask(i, p, steps, 1.0, 1, 1.0, []) for i, p in enumerate(PROMPTS)]
    tokens: list[list[int]] = [[] for _ in tasks]
    for _ in range(steps):
        for task, one, token in zip(tasks, tokens, model.batch_infer_one_round(tasks)):
            one.append(token)
            task.next(token)
    return tokens


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_two_devices_compute_what_one_does(builds, kv):
    with Qwen3ForCausalLM(build=builds[kv]) as one, Qwen3ForCausalLM(build=builds[kv], dev_ids=[3, 1], ndev=2) as two:
        for a, b in zip(one.forward(PROMPTS), two.forward(PROMPTS)):
            assert relative_l2(b, a) <= 5e-6  # other sums of the same terms
        assert greedy(one, 12) == greedy(two, 12)
        assert two.generate("123+456=")[0] == one.generate("123+456=")[0] == "579"


def test_a_cache_leaves_two_devices_and_enters_one(builds):
    """Exported keys and values have all heads, whoever holds them."""
    tokens = PROMPTS[2]
    with Qwen3ForCausalLM(build=builds["paged"]) as one, Qwen3ForCausalLM(build=builds["paged"], ndev=2) as two:
        source, target = two.engine.create_cache(0), one.engine.create_cache(0)
        two.engine.forward(tokens, [len(tokens)], [0], [source])
        values = two.engine.export_cache(source, 0, len(tokens), np.dtype(np.float32))
        one.engine.import_cache(target, 0, values)
        after = one.engine.forward([7], [1], [len(tokens)], [target])
        assert relative_l2(after, two.engine.forward([7], [1], [len(tokens)], [source])) <= 5e-6
        copy = two.engine.duplicate_cache(source, 20)  # shares blocks; the write below copies one on both devices
        two.engine.forward([9], [1], [20], [copy])
        assert np.array_equal(two.engine.export_cache(source, 0, len(tokens), np.dtype(np.float32)), values)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (
            dict(ndev=3),
            ConfigError,
            "divisor of the model's 6 attention heads|divisor of the model's 2 key/value heads",
        ),
        (dict(ndev=2, dev_ids=[1]), ConfigError, "expected 2 different device numbers"),
        (dict(ndev=2, dev_ids=[1, 1]), ConfigError, "expected 2 different device numbers"),
        (
            dict(ndev=2, dev_ids=[0, 4000]),
            ConfigError,
            "there is no device 4000 of target cpu: .* has 8, numbered from 0",
        ),
        (dict(dev_ids=[99]), ConfigError, "there is no device 99 of target cpu"),
        (dict(dev_ids=[-1]), ConfigError, r"dev_ids is \[-1\], expected device numbers, at least 0"),
        (dict(ndev=0), ConfigError, "ndev"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(builds, arguments, error, text):
    with pytest.raises(error, match=text):
        Qwen3ForCausalLM(build=builds["paged"], **arguments)
