"""What rounding to a half type does to a compiled model, measured with the interpreter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ir import constants
from ir.graph import Graph
from ir.interp import bind_inputs, run_node
from ir.types import DTYPES
from passes.legalise import legalise
from passes.lower import to_fused
from passes.roles import assign_roles
from passes.targets import Target

# Interpreting costs two runs of 2 * parameters operations per token. This many take about a minute on two cores; onnxruntime and the engine take theirs as well.
WORK = 2e12


@dataclass(frozen=True)
class Rounding:
    """What rounding does to the reference: relative L2 errors of the logits of ``positions`` tokens.

    Attributes:
        complete: these are all the tokens that are compared; of a large model or a long prompt it is the beginnings.
    """

    dtypes: tuple[str, ...]
    largest: float
    median: float
    positions: int
    complete: bool


@dataclass(frozen=True)
class Compiled:
    """What was compiled: a graph at stage "model", and the target and form of KV cache that decide its calls."""

    graph: Graph
    target: Target
    kv: str

    @property
    def parameters(self) -> int:
        return sum(math.prod(c.data.shape) for c in self.graph.constants.values())

    def calls(self, dtype: str, positions: int) -> Graph:
        """The graph at stage "infini", layers not rolled into a loop, for sequences of up to ``positions`` tokens."""
        target = self.target
        if dtype == "f32":  # to compare with: in float32 even where the target has none of it
            target = replace(target, ops={k: replace(op, dtypes=(*op.dtypes, "f32")) for k, op in target.ops.items()})
        fused, _ = assign_roles(to_fused(self.graph, dtype))
        return legalise(fused, target, kv=self.kv, max_positions=positions)


def measure_rounding(
    compiled: Compiled,
    folder: Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    dtypes: Sequence[str],
    more: Sequence[Sequence[int]] = (),
) -> tuple[Rounding | None, float]:
    """Interpret a build's calls in float32 and in each of ``dtypes``.

    The interpreter rounds every call's result once, as InfiniCore's kernels do. Weights are rounded too: the float32 run has them as the checkpoint does.

    Args:
        sequences: token ids.
        expected: per sequence, the reference's logits of its last positions.
        more: sequences to measure on as well.

    Returns:
        the errors of rounding (of several dtypes: their sums; None without any), and the largest relative L2 error of the float32 run against ``expected``
        (NaN if no sequence could be run to its end).
    """
    parts, complete = within_budget(sequences, compiled.parameters)
    tokens = [list(sequences[i][:n]) for i, n in parts]
    if complete:
        tokens += [list(s) for s in more]
    longest = max(map(len, tokens))
    exact = interpret(compiled.calls("f32", longest), folder, tokens)
    whole = [(exact[p][-len(expected[i]) :], expected[i]) for p, (i, n) in enumerate(parts) if n == len(sequences[i])]
    graph_error = max((float(relative_errors(a, b).max()) for a, b in whole), default=math.nan)
    if not dtypes:
        return None, graph_error
    total = np.zeros(sum(map(len, tokens)))
    for dtype in dtypes:
        rounded = interpret(compiled.calls(dtype, longest), folder, tokens)
        total += np.concatenate([relative_errors(a, b) for a, b in zip(rounded, exact)])
    largest, median = (
        (float(total.max()), float(np.median(total))) if np.isfinite(total).all() else (math.inf, math.inf)
    )
    return Rounding(tuple(dtypes), largest, median, len(total), complete), graph_error


def within_budget(sequences: Sequence[Sequence[int]], parameters: int) -> tuple[list[tuple[int, int]], bool]:
    """Which sequences are interpreted, and how much of each, for about WORK operations: short ones first, at least two tokens of the first.

    Returns:
        (sequence, tokens) pairs, and whether that is all.
    """
    room = max(int(WORK / (4 * max(parameters, 1))), 2)
    parts: list[tuple[int, int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        taken = min(len(sequences[i]), room)
        if taken == len(sequences[i]) or not parts:
            parts.append((i, taken))
            room -= taken
    return sorted(parts), len(parts) == len(sequences) and all(n == len(sequences[i]) for i, n in parts)


def relative_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 error of each row."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


def interpret(graph: Graph, folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Run a graph of stage "infini" on whole sequences, as one ragged batch; returns float32 logits [length, V] of each.

    Weights are read when they are needed and dropped after it, so that a large model takes no more memory than its largest weight.
    """
    lengths = np.array([len(s) for s in sequences], np.int32)
    total = int(lengths.sum())
    feeds: dict[str, np.ndarray] = {
        "tokens": np.concatenate([np.asarray(s) for s in sequences]).astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        "rows": np.arange(total, dtype=np.int32),
    }
    caches = {v.name: v.type for v in graph.inputs if v.name.startswith(("k_cache.", "v_cache."))}
    _, heads, block, dim = (d if isinstance(d, int) else 0 for d in next(iter(caches.values())).shape)
    if "slots" in graph.values:
        blocks, of_form = _paged(lengths, block)
        size = (blocks, heads, block, dim)
    else:
        of_form = dict(lens=lengths, starts=np.zeros(len(sequences), np.int32))
        size = (len(sequences), heads, int(lengths.max()), dim)
    feeds.update(of_form)
    feeds.update({name: np.zeros(size, DTYPES[t.dtype].numpy) for name, t in caches.items()})
    feeds = {v.name: feeds[v.name] for v in graph.inputs}
    symbols = bind_inputs(graph, feeds, {})
    env = dict(feeds)
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is seen in the result
        for i, node in enumerate(graph.nodes):
            env.update(
                {
                    n: constants.load(graph.constants[n].data, folder)
                    for n in node.inputs
                    if n in graph.constants and n not in env
                }
            )
            run_node(node, env, symbols, float64=False)
            for name in {*node.inputs, *(v.name for v in node.outputs)}:
                if last.get(name, -1) <= i and name != graph.outputs[0]:
                    env.pop(name, None)
    return np.split(env[graph.outputs[0]].astype(np.float32), np.cumsum(lengths)[:-1])


def _paged(lengths: np.ndarray, block: int) -> tuple[int, dict[str, np.ndarray]]:
    """The number of blocks, and what paged attention reads, for sequences that have the blocks one after another."""
    counts = -(-lengths // block)
    starts = np.cumsum(counts) - counts
    tables = np.zeros((len(lengths), int(counts.max())), np.int32)
    for row, start, count in zip(tables, starts, counts):
        row[:count] = np.arange(start, start + count)
    slots = np.concatenate([start * block + np.arange(n) for start, n in zip(starts, lengths)]).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return int(counts.sum()), dict(slots=slots, block_tables=tables, seq_lens=lengths, cu_lens=ends)
