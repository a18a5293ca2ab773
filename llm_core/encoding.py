"""Encodes many texts at once, in order: on threads of this process or on Ray.

Neither the engine nor the number of workers changes a result; how many texts are in flight is bounded by the number of workers.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Literal, TypeVar

from llm_core.errors import UserError
from llm_core.processes import available_cores
from llm_core.tokenizer import Ids, Tokenizer

Engine = Literal["local", "ray"]
Run = list[str]
_Pending = TypeVar("_Pending")

_RUN_CHARACTERS = 1 << 19
"""Text handed to a worker at once: some milliseconds of work, against which handing it over costs nothing."""


def check_engine(engine: Engine) -> None:
    """Raises UserError if the engine is not installed."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError('--engine ray needs the package ray; install it with: pip install -c constraints.txt -e ".[ray]"')


def encode_all(tokenizer: Tokenizer, texts: Iterable[str], workers: int, engine: Engine = "local") -> Iterator[Ids]:
    """Token ids of each text, in the order of the texts, which are read as far ahead as the workers need; workers 0: all cores.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """
    check_engine(engine)
    runs = _runs(texts)
    if engine == "ray":
        from llm_core.ray_engine import encode_on_ray  # only who asks for Ray needs it

        return chain.from_iterable(encode_on_ray(tokenizer, runs, workers))
    workers = workers or available_cores()
    if workers == 1:
        return chain.from_iterable(map(tokenizer.encode_batch, runs))
    return chain.from_iterable(_encode_on_threads(tokenizer, runs, workers))


def in_order(
    submit: Callable[[Run], _Pending], collect: Callable[[_Pending], list[Ids]], runs: Iterator[Run], in_flight: int
) -> Iterator[list[Ids]]:
    """The result of each run, in order, with at most `in_flight` of them submitted and not yet collected."""
    pending: deque[_Pending] = deque()
    for run in runs:
        pending.append(submit(run))
        if len(pending) == in_flight:
            yield collect(pending.popleft())
    while pending:
        yield collect(pending.popleft())


def _encode_on_threads(tokenizer: Tokenizer, runs: Iterator[Run], workers: int) -> Iterator[list[Ids]]:
    # The engines release the interpreter lock; meanwhile this thread reads the texts to come.
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(lambda run: pool.submit(tokenizer.encode_batch, run), Future.result, runs, 2 * workers)


def _runs(texts: Iterable[str]) -> Iterator[Run]:
    run: Run = []
    pending = 0
    for text in texts:
        run.append(text)
        pending += len(text)
        if pending >= _RUN_CHARACTERS:
            yield run
            run, pending = [], 0
    if run:
        yield run
