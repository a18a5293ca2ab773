"""What the log and the page of `raw_text` say of files that are not in the snapshot, or only in part."""

from collections.abc import Iterator, Mapping, Sequence

from llm_core.corpus import LISTED_QUARANTINES, READABLE, QuarantineEntry, Snapshot, skipped_entries

# More would push everything else off the screen.
LOGGED = 20
_NAMED_EXTENSIONS = 5

# In place of an empty line on the page.
NOTHING = "nothing"

# Entries that belong to a program, such as .git, and are left out on purpose.
_EXPECTED = "hidden"


def not_read(snapshot: Snapshot) -> str:
    """One line with the files of other formats and the skipped entries of the last scan; empty if there are none."""
    ignored, skipped = _ignored(snapshot), "; ".join(skipped_entries(snapshot.summary["files_skipped"]))
    return "; ".join(part for part in (ignored, skipped and f"skipped: {skipped}") if part)


def folder_warnings(snapshot: Snapshot) -> Iterator[str]:
    """A line if most files are ignored, and one if entries are skipped that a user may take for text."""
    files, ignored = snapshot.summary["files"], snapshot.summary["files_ignored"]
    if ignored > files:
        yield f"ignored: {_ignored(snapshot)} of {files + ignored:,}; only {READABLE} files are read, also with .gz or .zst"
    unexpected = {reason: count for reason, count in snapshot.summary["files_skipped"].items() if reason != _EXPECTED}
    if unexpected:
        yield f"skipped: {'; '.join(skipped_entries(unexpected))}: put the text itself into the folder"


def quarantine_lines(snapshot: Snapshot, losses: Sequence[QuarantineEntry], known: bool) -> Iterator[str]:
    """The totals, and a line for each of the largest losses.

    losses: all that is quarantined in the snapshot. known: the last run has logged them: the totals are enough.
    """
    reasons = snapshot.summary["quarantined_by_reason"]
    if not reasons:
        return
    totals = f"quarantined: {sum(reasons.values()):,} files, lines or rows ({_counts(reasons)})"
    if known:
        yield f"{totals}, unchanged since the last run"
        return
    yield totals
    for loss in losses[:LOGGED]:
        yield f"quarantined {loss['path']}: {loss['reason']} ({loss['detail']})"
    if len(losses) > LOGGED:
        yield (
            f"and {len(losses) - LOGGED:,} more; the page of raw_text lists up to {LISTED_QUARANTINES}, and the tables of the "
            f"snapshot {snapshot.snapshot_id} in the prepared data have all"
        )


def _ignored(snapshot: Snapshot) -> str:
    """The number of files of other formats, with the most frequent extensions; empty if there are none."""
    total = snapshot.summary["files_ignored"]
    if not total:
        return ""
    most = dict([*snapshot.summary["ignored_by_extension"].items()][:_NAMED_EXTENSIONS])
    rest = total - sum(most.values())
    extensions = [f"{count:,} {extension}" for extension, count in most.items()] + ([f"{rest:,} others"] if rest else [])
    return f"{total:,} files of other formats ({', '.join(extensions)})"


def _counts(by_reason: Mapping[str, int]) -> str:
    most = sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in most)
