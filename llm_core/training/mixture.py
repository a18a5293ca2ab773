"""The share of each group of documents in a run: sources by weight, replay of old text, and a cap on repetition."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llm_core.config import ResolvedTrainConfig
from llm_core.corpus import load_snapshot
from llm_core.dataset import ALL, SHARE_UNITS, DatasetManifest, DocumentGroups, groups_by_source, known_first
from llm_core.errors import UserError

OLD, NEW, OTHERS = "seen before", "new", "*"


@dataclass(frozen=True)
class Mixture:
    """Groups of the training text, and the share of the windows that the options request for each."""

    groups: DocumentGroups
    shares: list[float]  # their sum is 1


def plan_mixture(
    config: ResolvedTrainConfig, data_dir: Path, manifest: DatasetManifest, known: pa.Array | None
) -> Mixture | None:
    """The mixture that the options request, None if they request none. known: ids of the documents that the parent has read.

    Raises:
        UserError: the weights name an unknown source or omit one, or there is no record of what the parent has read.
    """
    groups, shares = ALL, [1.0]
    if config.source_weights:
        groups = groups_by_source(load_snapshot(data_dir, manifest.snapshot_id).kept_documents())
        shares = _source_shares(config.source_weights, groups.names)
    if config.replay_share is None:
        return Mixture(groups, shares) if config.source_weights else None
    if known is None:
        raise UserError(
            f"--replay_share {config.replay_share}: beside --init_from {config.init_from} is no record of what that run has read "
            "(run.json and document_steps.parquet); name the checkpoint in the folder it was trained in, or omit the option"
        )
    new = groups if config.source_weights else DocumentGroups([NEW], groups.group_of)
    replay = config.replay_share
    return Mixture(known_first(known, new, OLD), [replay, *((1 - replay) * share for share in shares)])


def final_shares(mixture: Mixture, sizes: list[int], windows: int, max_source_epochs: float) -> list[int]:
    """The shares of a run of `windows` windows, in units of 1 / SHARE_UNITS. sizes: windows of each group.

    No group is read more than `max_source_epochs` times: the excess goes to the other groups in proportion.

    Raises:
        UserError: all groups together cannot fill the run; the message has the numbers.
    """
    shares, excess = _capped(mixture.shares, [max_source_epochs * size / windows for size in sizes])
    if excess > 1e-9:
        capped = _quoted(name for name, share in zip(mixture.groups.names, shares, strict=True) if share)
        raise UserError(
            f"--max_steps: the run reads {windows:,} windows, more than {capped or 'the weighted sources'} can give at "
            f"--max_source_epochs {max_source_epochs:g}; {_what_fits(windows, 1 - excess, max_source_epochs)}"
        )
    units = [int(share * SHARE_UNITS) for share in shares]
    units[max(range(len(units)), key=units.__getitem__)] += SHARE_UNITS - sum(units)  # the largest absorbs the rounding
    return units


def _what_fits(windows: int, share: float, max_source_epochs: float) -> str:
    """The options with which the groups are enough. share: of the windows that they can give now."""
    if share < 1e-9:
        return "give other sources a weight"
    steps, epochs = math.floor(windows * share + 1e-6), math.ceil(1000 * max_source_epochs / share) / 1000
    return f"lower --max_steps times --batch_size to {steps}, raise --max_source_epochs to {epochs:g}, or weigh other sources too"


def _capped(shares: list[float], limits: list[float]) -> tuple[list[float], float]:
    """Shares that exceed no limit, as close to proportional as the limits allow, and the excess that no group can take."""
    capped, excess = [0.0] * len(shares), 1.0
    free = {group for group, limit in enumerate(limits) if limit and shares[group]}
    while free:
        total = sum(shares[group] for group in free)
        proportional = {group: excess * shares[group] / total for group in free}
        over = {group for group in free if proportional[group] > limits[group]}
        if not over:
            return [proportional.get(group, share) for group, share in enumerate(capped)], 0.0
        for group in over:
            capped[group] = limits[group]
        free, excess = free - over, excess - sum(limits[group] for group in over)
    return capped, excess


def _source_shares(weights: dict[str, float], names: list[str]) -> list[float]:
    unknown = sorted(weights.keys() - {*names, OTHERS})
    if unknown:
        raise UserError(f"--source_weights: no source {_quoted(unknown)} in this text; it has {_quoted(names)}")
    missing = [name for name in names if name not in weights and OTHERS not in weights]
    if missing:
        raise UserError(
            f"--source_weights: no weight for {_quoted(missing)}; add one (0 omits a source)"
            f" or {_quoted([OTHERS])} for all others"
        )
    of_sources = [weights.get(name, weights.get(OTHERS, 0.0)) for name in names]
    if not sum(of_sources):
        raise UserError(f"--source_weights {weights}: every weight is 0; give at least one source a positive weight")
    return [weight / sum(of_sources) for weight in of_sources]


def _quoted(sources: Iterable[str]) -> str:
    """Names of sources as the option spells them: without quotes, "." would end the sentence."""
    return ", ".join(json.dumps(source, ensure_ascii=False) for source in sources)
