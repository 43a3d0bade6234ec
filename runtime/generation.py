"""An answer as it is made, and how a batch of token sequences is cut into engine calls."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What is known of an answer so far. Apart from Generation, so that the generator which fills it does not refer back
    to its owner: such a cycle would be left to the garbage collector, which may end it in any thread.
    """

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reused: int = 0
    finish_reason: str | None = None


class Generation:
    """An answer in the making: iterate for its text, piece by piece.

    ``prompt_tokens`` and ``tokens`` (without the end token) are ids, ``reused`` counts prompt tokens found in an earlier
    request's cache, ``seconds`` is the wall time of each step, ``finish_reason`` is None, ``"stop"`` or ``"length"``.
    Leaving early (close(), or ending a ``with``) gives the cache back.
    """

    def __init__(
        self, prompt_tokens: list[int], seed: int, progress: Progress, pieces: Generator[str, None, None]
    ) -> None:
        self.prompt_tokens, self.seed = prompt_tokens, seed
        self._progress, self._pieces = progress, pieces

    @property
    def tokens(self) -> list[int]:
        return self._progress.tokens

    @property
    def seconds(self) -> list[float]:
        return self._progress.seconds

    @property
    def reused(self) -> int:
        return self._progress.reused

    @property
    def finish_reason(self) -> str | None:
        return self._progress.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()

    @property
    def ms_per_step(self) -> float:
        """Mean wall time of a step in milliseconds, the first one (which reads the prompt) left out if there are others."""
        steps = self.seconds[1:] or self.seconds
        return 1000.0 * sum(steps) / len(steps) if steps else 0.0


def schedule(lengths: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut sequences into calls of at most ``limit`` tokens: lists of (sequence, start, stop).

    A sequence is always cut at multiples of ``limit``, whatever else is in the batch, so that its numbers do not depend
    on its neighbours. Short ones go first, together.
    """
    waiting = sorted((min(length, limit), i) for i, length in enumerate(lengths))
    done = [0] * len(lengths)
    while waiting:
        call, room, later = [], limit, []
        for size, i in waiting:
            if size > room:
                later.append((size, i))
                continue
            call.append((i, done[i], done[i] + size))
            done[i] += size
            room -= size
            if done[i] < lengths[i]:
                later.append((min(lengths[i] - done[i], limit), i))
        waiting = sorted(later)
        yield call
