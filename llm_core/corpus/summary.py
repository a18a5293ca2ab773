"""The summary of a snapshot: every byte read is kept, or dropped for a reason."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus.filters import FEW_LETTERS, REPETITIVE, TOO_LONG, TOO_SHORT
from llm_core.corpus.types import CONVERT, HARMLESS, KEPT, NEAR_DUPLICATE, format_of

LISTED_QUARANTINES = 100
LISTED_EXTENSIONS = 50
LISTED_FOLDERS = 50

# A larger share of dropped text causes a warning.
WARN_DROPPED = 0.05

# What is dropped around the text of a file, not text itself.
MARKUP = ("byte_order_mark", "jsonl_envelope")

# The option that keeps text which is dropped for a reason.
REMEDIES = {
    "not_utf8": "--invalid_utf8 replace",
    "no_text_field": "another --text_field",
    TOO_SHORT: "a smaller --min_characters",
    TOO_LONG: "a larger --max_characters",
    FEW_LETTERS: "a smaller --min_letter_share",
    REPETITIVE: "a larger --max_repetition",
    NEAR_DUPLICATE: "a larger --near_duplicates",
}

# The reason of a compressed file that is used up to where it is damaged.
CUT_SHORT = "rest_unreadable"


class ByteTotals(TypedDict):
    bytes_read: int
    bytes_kept: int
    bytes_dropped: dict[str, int]  # by reason
    documents_dropped: dict[str, int]  # by reason; a file without documents counts as one
    sequences_replaced: int
    train_bytes: int
    val_bytes: int


class FileChanges(TypedDict):
    files_added: int
    files_changed: int
    files_removed: int
    files_unchanged: int


class ScanCounts(FileChanges):
    files_ignored: int
    ignored_by_extension: dict[str, int]  # the most frequent ones
    files_skipped: dict[str, int]  # by reason
    unreadable_folders: NotRequired[list[str]]  # the first ones; not in older summaries


class QuarantineEntry(TypedDict):
    path: str
    reason: str
    detail: str


class Quarantines(TypedDict):
    quarantined: list[QuarantineEntry]
    quarantined_by_reason: dict[str, int]


class SnapshotTotals(ByteTotals, ScanCounts, Quarantines):
    format_version: int
    snapshot_id: str
    config: dict[str, Any]
    parent_snapshot_id: str | None
    files: int
    documents: int  # kept ones


class TableFile(TypedDict):
    file: str
    sha256: str


class SnapshotSummary(SnapshotTotals):
    """The JSON file of a snapshot."""

    files_table: TableFile
    documents_table: TableFile


def byte_totals(files: pa.Table, documents: pa.Table) -> ByteTotals:
    """`bytes_read` = `bytes_kept` + the sum of `bytes_dropped` (by reason)."""
    by_status = _sums(documents, "status")
    kept = by_status.pop(KEPT, 0)
    dropped = Counter(by_status)
    for reason in MARKUP:
        dropped[reason] += pc.sum(files[reason]).as_py()
    # A file without documents is dropped entirely, with its own status as the reason.
    for row in files.filter(pc.equal(files["documents"], 0)).to_pylist():
        dropped[row["status"]] += row["bytes"] - row["byte_order_mark"] - row["jsonl_envelope"]
    by_split = _sums(documents.filter(pc.equal(documents["status"], KEPT)), "split")
    return {
        "bytes_read": pc.sum(files["bytes"]).as_py(),
        "bytes_kept": kept,
        "bytes_dropped": {reason: size for reason, size in dropped.items() if size},
        "documents_dropped": documents_dropped(files, documents),
        "sequences_replaced": pc.sum(files["replaced"]).as_py(),
        "train_bytes": by_split.get("train", 0),
        "val_bytes": by_split.get("val", 0),
    }


def documents_dropped(files: pa.Table, documents: pa.Table) -> dict[str, int]:
    """Documents that are not kept by reason, and files without documents, each as one."""
    statuses = pa.chunked_array(
        [*documents["status"].chunks, *files.filter(pc.equal(files["documents"], 0))["status"].chunks], pa.string()
    )
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(statuses).to_pylist()}
    return {reason: count for reason, count in counts.items() if reason != KEPT}


class Dropped(TypedDict):
    """Text that is dropped for one reason. share: of the bytes of all text read, without markup."""

    reason: str
    documents: int
    bytes: int
    share: float


def dropped_text(summary: SnapshotSummary) -> list[Dropped]:
    """What is dropped for each reason, the most bytes first. Markup around the text does not count."""
    sizes = {reason: size for reason, size in summary["bytes_dropped"].items() if reason not in MARKUP}
    text = summary["bytes_kept"] + sum(sizes.values())
    documents = summary["documents_dropped"]
    reasons = sorted(documents.keys() | sizes.keys(), key=lambda reason: (-sizes.get(reason, 0), reason))
    return [
        {
            "reason": reason,
            "documents": documents.get(reason, 0),
            "bytes": sizes.get(reason, 0),
            "share": sizes.get(reason, 0) / max(1, text),
        }
        for reason in reasons
    ]


def remedy_for(reason: str, totals: SnapshotTotals) -> str | None:
    """What keeps text that is dropped for a reason, None if nothing does. Of text that is not UTF-8, the largest file decides."""
    if reason == "not_utf8":
        largest = next((entry for entry in totals["quarantined"] if entry["reason"] == reason), None)
        if largest and CONVERT in largest["detail"]:
            return "converting it to UTF-8"
    return REMEDIES.get(reason)


def drop_warning(summary: SnapshotSummary) -> str | None:
    """A line for the user if a folder cannot be listed or more than `WARN_DROPPED` of the text is dropped: why, and a remedy."""
    return "; ".join(filter(None, (_unlisted(summary), _dropped(summary)))) or None


def _unlisted(summary: SnapshotSummary) -> str | None:
    if not (folders := summary.get("unreadable_folders")):
        return None
    more = f" and {count - 1:,} more" if (count := summary["files_skipped"]["unreadable_folder"]) > 1 else ""
    return f"the files in {folders[0]!r}{more} are left out, and count as removed if they were read before: make it readable"


def _dropped(summary: SnapshotSummary) -> str | None:
    dropped = dropped_text(summary)
    share = sum(each["share"] for each in dropped)
    if share <= WARN_DROPPED:
        return None
    reasons = []
    for each in dropped[:3]:
        if each["share"] >= 0.001:
            remedy = remedy_for(each["reason"], summary)
            reasons.append(f"{each['share']:.1%} {each['reason']}{f' ({remedy} keeps it)' if remedy else ''}")
    return f"{share:.1%} of the text is dropped: {', '.join(reasons)}"


def skipped_entries(counts: Mapping[str, int]) -> Iterator[str]:
    """What is never read, a phrase for each reason."""
    for reason, count in sorted(counts.items()):
        notes = {"link_to_folder": ", not followed", "unreadable_folder": ", its files are unknown"}
        yield f"{count:,} {reason.replace('_', ' ')}{notes.get(reason, '')}"


def file_changes(files: pa.Table, previous: pa.Table | None) -> FileChanges:
    """How the files differ from those of the previous snapshot, by content."""
    before = _contents(previous) if previous is not None else {}
    now = _contents(files)
    unchanged = sum(before.get(path) == content for path, content in now.items())
    added = len(now.keys() - before.keys())
    return {
        "files_added": added,
        "files_changed": len(now) - unchanged - added,
        "files_removed": len(before.keys() - now.keys()),
        "files_unchanged": unchanged,
    }


def quarantine(files: pa.Table, documents: pa.Table) -> Quarantines:
    """Files, .jsonl lines and .parquet rows that are quarantined: the largest losses are listed, all are counted by reason."""
    unusable = files.filter(pc.equal(files["documents"], 0))["status"]
    cut_short = pc.sum(pc.not_equal(files.filter(pc.greater(files["documents"], 0))["detail"], "")).as_py() or 0
    by_reason = Counter({CUT_SHORT: cut_short} if cut_short else {})
    for statuses in (unusable, _quarantined(documents)["status"]):
        by_reason.update({count["values"]: count["counts"] for count in pc.value_counts(statuses).to_pylist()})
    return {
        "quarantined": quarantine_entries(files, documents)[:LISTED_QUARANTINES],
        "quarantined_by_reason": dict(by_reason),
    }


def quarantine_entries(files: pa.Table, documents: pa.Table) -> list[QuarantineEntry]:
    """All that is quarantined, the most bytes first: an entry for each file, or for each reason of its lines or rows.

    Of a compressed file that is cut short the rest is quarantined, and the file is kept.
    """
    losses: list[tuple[int, QuarantineEntry]] = []
    not_kept = pc.or_(pc.equal(files["documents"], 0), pc.not_equal(files["detail"], ""))
    for row in files.filter(not_kept).to_pylist():
        if row["documents"]:
            losses.append((0, {"path": row["path"], "reason": CUT_SHORT, "detail": row["detail"]}))
        else:
            detail = row["detail"] or "no text in it"
            losses.append((row["bytes"], {"path": row["path"], "reason": row["status"], "detail": detail}))
    by_file = _quarantined(documents).group_by(["path", "status"])
    for row in by_file.aggregate([("bytes", "sum"), ("start", "min"), ([], "count_all")]).to_pylist():
        detail = _places(row["path"], row["count_all"], row["start_min"])
        losses.append((row["bytes_sum"], {"path": row["path"], "reason": row["status"], "detail": detail}))
    losses.sort(key=lambda loss: (-loss[0], loss[1]["path"], loss[1]["reason"]))
    return [entry for _, entry in losses]


def _quarantined(documents: pa.Table) -> pa.Table:
    return documents.filter(pc.invert(pc.is_in(documents["status"], value_set=pa.array(sorted(HARMLESS)))))


def _places(path: str, count: int, first: int) -> str:
    unit, place = ("row", f"row {first}") if format_of(path) == "parquet" else ("line", f"line at byte {first}")
    return place if count == 1 else f"{count:,} {unit}s, the first: {place}"


def _sums(documents: pa.Table, key: str) -> dict[str, int]:
    grouped = documents.group_by(key).aggregate([("bytes", "sum")])
    return dict(zip(grouped[key].to_pylist(), grouped["bytes_sum"].to_pylist(), strict=True))


def _contents(files: pa.Table) -> dict[str, tuple[str, str]]:
    columns = (files[name].to_pylist() for name in ("path", "sha256", "status"))
    return {path: (sha256, status) for path, sha256, status in zip(*columns, strict=True)}
