"""Encoding on Ray: a Ray of our own on this machine, or the cluster that RAY_ADDRESS names.

The texts travel to the workers and the ids back through Ray's object store, so that the raw text need not be reachable from the
cluster; what a worker needs is textmill installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

from llm_core.encoding import Run, in_order
from llm_core.errors import UserError
from llm_core.tokenizer import Ids, Tokenizer

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported, and calls home without it

import ray


def encode_on_ray(tokenizer: Tokenizer, runs: Iterator[Run], workers: int) -> Iterator[list[Ids]]:
    """The ids of each run of texts, in order, with two runs per worker in flight; workers 0: one per CPU of the cluster.

    Raises:
        UserError: the cluster cannot be reached.
    """
    first = next(runs, None)
    if first is None:  # a rerun with nothing new need not wait for Ray
        return
    with _connected(workers):
        serialized = ray.put(tokenizer.serialized)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        encode: Any = ray.remote(_encode)
        yield from in_order(lambda run: encode.remote(serialized, run), _collect, chain([first], runs), 2 * count)


def _collect(reference: Any) -> list[Ids]:
    try:
        ids: list[Ids] = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"--engine ray: a worker failed ({reason}); every machine of the cluster needs this version of textmill"
        ) from None
    return ids


def _encode(serialized: bytes, run: Run) -> list[Ids]:
    return _tokenizer(serialized).encode_batch(run)


@lru_cache(maxsize=1)
def _tokenizer(serialized: bytes) -> Tokenizer:
    """Built once in each worker: that takes as long as to encode some megabytes."""
    return Tokenizer(serialized)


@contextmanager
def _connected(workers: int) -> Iterator[None]:
    """Ray for the time of the block; one that was running before is left running."""
    if ray.is_initialized():
        yield
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
        yield
    finally:
        ray.shutdown()
