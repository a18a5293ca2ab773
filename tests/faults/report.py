"""The result of a scenario."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Faults of one kind: how many were injected, how many of them did no harm, and what the others cost."""

    scenario: str
    seed: int
    injected: int = 0
    survived: int = 0
    losses: list[str] = field(default_factory=list)

    def count(self, problem: str | None) -> None:
        """Counts one fault and prints every tenth; problem: what it cost, None if nothing."""
        self.injected += 1
        if problem is None:
            self.survived += 1
        else:
            self.losses.append(problem)
        if problem is not None or self.injected % 10 == 0:
            print(f"{self.scenario}: {self.injected} injected, {len(self.losses)} lost", problem or "", flush=True)


def table(tallies: list[Tally]) -> str:
    rows = [("scenario", "seed", "injected", "survived", "lost")]
    rows += [(t.scenario, str(t.seed), str(t.injected), str(t.survived), str(len(t.losses))) for t in tallies]
    totals = [sum(values) for values in zip(*((t.injected, t.survived, len(t.losses)) for t in tallies), strict=True)]
    rows.append(("all", "", *map(str, totals)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
