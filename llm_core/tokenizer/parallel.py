"""Encodes many texts in parallel and in order, on threads or on Ray.

Neither the engine nor the number of workers changes a result. The number of texts in flight is bounded.

Texts travel to Ray's workers, and ids back, through the object store: the cluster need not reach the raw text, but every worker
needs textmill installed.
"""

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, TypeVar

from llm_core.errors import UserError
from llm_core.system import available_cores
from llm_core.tokenizer.tokenizer import Ids, Tokenizer

Engine = Literal["local", "ray"]
Batch = list[str]
_Pending = TypeVar("_Pending")

# Characters per batch: some milliseconds of work, so that the hand-over costs nothing.
_BATCH_CHARACTERS = 1 << 19


def check_engine(engine: Engine) -> None:
    """Raises UserError if the engine is not installed."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError('--engine ray needs the package ray; install it with: pip install -c constraints.txt -e ".[ray]"')


def encode_all(tokenizer: Tokenizer, texts: Iterable[str], workers: int, engine: Engine = "local") -> Iterator[Ids]:
    """Token ids of each text, in order. Texts are read only as far ahead as the workers need. workers 0: all cores.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """
    check_engine(engine)
    batches = _batches(texts)
    if engine == "ray":
        return chain.from_iterable(encode_on_ray(tokenizer, batches, workers))
    workers = workers or available_cores()
    if workers == 1:
        return chain.from_iterable(map(tokenizer.encode_batch, batches))
    return chain.from_iterable(_encode_on_threads(tokenizer, batches, workers))


def in_order(
    submit: Callable[[Batch], _Pending], collect: Callable[[_Pending], list[Ids]], batches: Iterator[Batch], in_flight: int
) -> Iterator[list[Ids]]:
    """The result of each batch, in order, with at most `in_flight` batches submitted and not collected."""
    pending: deque[_Pending] = deque()
    for batch in batches:
        pending.append(submit(batch))
        if len(pending) == in_flight:
            yield collect(pending.popleft())
    while pending:
        yield collect(pending.popleft())


def _encode_on_threads(tokenizer: Tokenizer, batches: Iterator[Batch], workers: int) -> Iterator[list[Ids]]:
    # The engines release the interpreter lock; meanwhile this thread reads the next texts.
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(lambda batch: pool.submit(tokenizer.encode_batch, batch), Future.result, batches, 2 * workers)


def _batches(texts: Iterable[str]) -> Iterator[Batch]:
    batch: Batch = []
    pending = 0
    for text in texts:
        batch.append(text)
        pending += len(text)
        if pending >= _BATCH_CHARACTERS:
            yield batch
            batch, pending = [], 0
    if batch:
        yield batch


def encode_on_ray(tokenizer: Tokenizer, batches: Iterator[Batch], workers: int) -> Iterator[list[Ids]]:
    """The ids of each batch of texts, in order, with two batches per worker in flight; workers 0: one per CPU of the cluster.

    Raises:
        UserError: the cluster cannot be reached.
    """
    first = next(batches, None)
    if first is None:  # nothing to encode: do not start Ray
        return
    with _connected_to_ray(workers) as ray:
        serialized = ray.put(tokenizer.serialized)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        encode: Any = ray.remote(_encode)

        def collect(reference: Any) -> list[Ids]:
            try:
                ids: list[Ids] = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(
                    f"--engine ray: a worker failed ({reason}); every machine of the cluster needs this version of textmill"
                ) from None
            return ids

        yield from in_order(lambda batch: encode.remote(serialized, batch), collect, chain([first], batches), 2 * count)


def _encode(serialized: bytes, batch: Batch) -> list[Ids]:
    return _tokenizer(serialized).encode_batch(batch)


@lru_cache(maxsize=1)
def _tokenizer(serialized: bytes) -> Tokenizer:
    """Built once per worker, which takes as long as encoding some megabytes."""
    return Tokenizer(serialized)


@contextmanager
def _connected_to_ray(workers: int) -> Iterator[Any]:
    """Yields the module ray, connected; a connection that existed before is left open."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported; without it Ray reports usage statistics
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=workers or None, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = f"RAY_ADDRESS={address}" if address else "a Ray on this machine"
        raise UserError(f"--engine ray: {where} cannot be used ({error}); start the cluster or use --engine local") from None
    try:
        yield ray
    finally:
        ray.shutdown()
