"""How much a run reads of each part of the text: sources by weight, old text for replay, and a cap on repetition."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llm_core.config import TrainConfig
from llm_core.corpus import load_snapshot
from llm_core.errors import UserError
from llm_core.order import SHARE_UNITS
from llm_core.parts import ALL, Parts, known_first, parts_by_source
from llm_core.shards import DatasetManifest

OLD, NEW, OTHERS = "seen before", "new", "*"


@dataclass(frozen=True)
class Mixture:
    """The parts of the training text and the share of the windows that each one is meant to have; the shares add up to 1."""

    parts: Parts
    wanted: list[float]


def plan_mixture(config: TrainConfig, data_dir: Path, manifest: DatasetManifest, known: pa.Array | None) -> Mixture | None:
    """What the options ask for; None where all text is alike. known: ids of the documents that the parent has seen.

    Raises:
        UserError: the weights name a source that is not there or leave one out, or nobody knows what the parent has seen.
    """
    parts, wanted = ALL, [1.0]
    if config.source_weights:
        parts = parts_by_source(load_snapshot(data_dir, manifest.snapshot_id).kept_documents())
        wanted = _source_shares(config.source_weights, parts.names)
    if config.replay_share is None:
        return Mixture(parts, wanted) if config.source_weights else None
    if known is None:
        raise UserError(
            f"--replay_share {config.replay_share}: beside --init_from {config.init_from} no record tells what it has seen "
            "(run.json and document_steps.parquet); name the checkpoint in the folder it was trained in, or leave the option out"
        )
    new = parts if config.source_weights else Parts([NEW], parts.part_of)
    replay = config.replay_share
    return Mixture(known_first(known, new, OLD), [replay, *((1 - replay) * share for share in wanted)])


def final_shares(mixture: Mixture, sizes: list[int], windows: int, max_source_epochs: float) -> list[int]:
    """The shares that a run of `windows` windows can keep to, in units of 1 / SHARE_UNITS; sizes: windows of each part.

    No part is read more than `max_source_epochs` times over: what is cut from one goes to the others in proportion.

    Raises:
        UserError: even so the run is longer than the text allows; the message has the numbers.
    """
    limits = [max_source_epochs * size / windows for size in sizes]
    shares = [0.0] * len(sizes)
    free = {part for part, limit in enumerate(limits) if limit and mixture.wanted[part]}
    left = 1.0
    while free:
        total = sum(mixture.wanted[part] for part in free)
        shares = [left * mixture.wanted[part] / total if part in free else share for part, share in enumerate(shares)]
        over = {part for part in free if shares[part] > limits[part]}
        if not over:
            break
        for part in over:
            shares[part] = limits[part]
        free, left = free - over, left - sum(limits[part] for part in over)
    if not free and left > 1e-9:
        capped = ", ".join(name for name, share in zip(mixture.parts.names, shares, strict=True) if share)
        raise UserError(
            f"--max_steps: the run reads {windows:,} windows, more than {capped or 'the weighted sources'} can give at "
            f"--max_source_epochs {max_source_epochs:g}; lower --max_steps, raise --max_source_epochs, or weigh other sources too"
        )
    units = [int(share * SHARE_UNITS) for share in shares]
    units[max(range(len(units)), key=units.__getitem__)] += SHARE_UNITS - sum(units)
    return units


def _source_shares(weights: dict[str, float], names: list[str]) -> list[float]:
    unknown = sorted(weights.keys() - {*names, OTHERS})
    if unknown:
        raise UserError(f"--source_weights: no source {', '.join(unknown)} in this text; it has {', '.join(names)}")
    missing = [name for name in names if name not in weights and OTHERS not in weights]
    if missing:
        raise UserError(
            f"--source_weights: no weight for {', '.join(missing)}; add one (0 leaves a source out) or {OTHERS} for all others"
        )
    found = [weights.get(name, weights.get(OTHERS, 0.0)) for name in names]
    if not sum(found):
        raise UserError(f"--source_weights {weights}: every weight is 0; give at least one source more")
    return [weight / sum(found) for weight in found]
