"""Runs beside each other: what differs between their configs, how far their losses lie apart, what that proves."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer import pictures
from jaxformer.lab.groups import Group, differences, find_runs, grouped, numbers_of, told
from jaxformer.lab.intervals import ERROR, Estimate, estimate, paired_difference, welch_difference
from jaxformer.lab.tables import aligned_table, csv_table, markdown_table
from jaxformer.run.metrics import less_is_better
from jaxformer.spec import InputError


def compare(runs: str | Path | Sequence[str | Path], by: str = "loss") -> "Comparison":
    """Compares runs, found in the folders given and in those within, by a number of their evaluations.

    Runs that differ by their seed, and by what does not change their numbers, are a group; the first group that has a
    number is what the others are compared with. Nothing is built or executed. Raises InputError if there is no run or
    no such number.
    """
    records = find_runs([runs] if isinstance(runs, str | Path) else list(runs))
    names = numbers_of(records)
    if by not in names:
        raise InputError(f"by={by!r} must be a number of the runs' evaluations: {', '.join(names) or 'they have none'}")
    groups = sorted(grouped(records, by), key=lambda group: not group.records)  # the first is one with numbers
    first, *others = groups
    reasons = [_why_not(first, other, by) for other in others]
    tests = max(1, reasons.count(""))
    return Comparison(by, groups, [_verdict(first, g, by, why, tests) for g, why in zip(others, reasons, strict=True)])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A group against the first one."""

    difference: Estimate | None  # the group's mean less that of the first; None if they cannot be compared at all
    paired: bool  # by seeds
    said: str  # "lower", "higher", "no difference shown", or why there is no verdict

    @property
    def differ(self) -> bool:
        return self.said in ("lower", "higher")


def judge(first: Mapping[int, float], second: Mapping[int, float], tests: int = 1) -> Verdict:
    """Whether the means of two groups, seed → number, differ: at most one time in twenty, of all tests together, are
    groups called different that are not."""
    paired = first.keys() == second.keys()
    if paired:
        found = paired_difference(list(first.values()), [second[seed] for seed in first], ERROR / tests)
    else:
        found = welch_difference(list(first.values()), list(second.values()), ERROR / tests)
    if found.p_value is None:
        alone = min(len(first), len(second)) < 2
        return Verdict(
            found, paired, f"no verdict: {'one seed; train more of them' if alone else 'the seeds are all alike'}"
        )
    shown = found.p_value < ERROR / tests
    return Verdict(found, paired, ("lower" if found.mean < 0 else "higher") if shown else "no difference shown")


def _why_not(first: Group, other: Group, by: str) -> str:
    """Why two groups cannot be compared, "" if they can."""
    pairs = [(a, b) for a in first.records for b in other.records if first.seeds != other.seeds or a.seed == b.seed]
    if not pairs:
        return "no run with a final number"
    if first.diverged or other.diverged:
        return "a run diverged, and the mean of the others would hide it"

    def hint(part: str) -> str:
        unknown = {module for pair in pairs for record in pair if (module := record.unknown(part))}
        return f"; --import={min(unknown)} may tell more" if unknown else ""

    if any(a.text != b.text for a, b in pairs):
        cut = all(record.text[0] == "corpus" for pair in pairs for record in pair)  # from it, as the sampling says
        return f"the validation texts differ{hint('sampling') if cut else ''}"
    if any(a.objective != b.objective for a, b in pairs):
        return f"the objectives differ, and so does what is measured{hint('objective')}"
    windows = lambda a, b: a.cut and b.cut and a.cut[0] != b.cut[0] and a.cut[1] != b.cut[1]
    of_tokens = any("tokens" in r.end for pair in pairs for r in pair) and not by.startswith("bits_per_byte")
    if of_tokens and any(a.texts["tokenizer_sha256"] != b.texts["tokenizer_sha256"] for a, b in pairs):
        there = all("bits_per_byte" in r.end for pair in pairs for r in pair)
        return "the tokenizers differ, and so do their tokens" + "; compare with by=bits_per_byte" * there
    if any(windows(a, b) for a, b in pairs if a.texts["tokenizer_sha256"] == b.texts["tokenizer_sha256"]):
        return "the validation texts are cut at other lengths"
    if any(a.shares != b.shares and not a.of_part(by) for a, b in pairs):
        return "the shares of the validation texts differ; compare with by=loss_NAME, of one of them"
    return ""


def _verdict(first: Group, other: Group, by: str, why_not: str, tests: int) -> Verdict:
    return Verdict(None, False, f"no verdict: {why_not}") if why_not else judge(first.final(by), other.final(by), tests)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` finds; printed it is a text, and `markdown`, `csv`, `json` and `figure` are the same in other
    forms."""

    by: str
    groups: list[Group]
    verdicts: list[Verdict]  # of each group but the first, against the first

    @property
    def differences(self) -> dict[str, list[Any]]:
        """Path of a field → its value in each group."""
        return differences([group.config for group in self.groups])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each group; intervals are 95 % confidence intervals of the mean, by Student's t."""
        return [self._row(i, group) for i, group in enumerate(self.groups, 1)]

    def _row(self, number: int, group: Group) -> dict[str, Any]:
        by, seeds = self.by, group.seeds
        row = {"group": number, "name": group.name, "seeds": seeds, "steps": group.config["train"]["steps"]}
        for name, values in (("final", group.final(by)), ("best", group.best(by))):
            found = estimate(list(values.values())) if values else None
            row[f"{name}_{by}"] = found and found.mean
            row |= {f"{name}_half_width": found and found.half_width, f"{name}_deviation": found and found.deviation}
        verdict = self.verdicts[number - 2] if number > 1 else Verdict(None, False, "")
        found = verdict.difference
        row |= {"difference": found and found.mean, "difference_half_width": found and found.half_width}
        other = row["steps"] != self.groups[0].config["train"]["steps"]
        said = f"{verdict.said} (other number of steps)" if other and verdict.said else verdict.said
        return row | {"p_value": found and found.p_value, "paired": verdict.paired, "verdict": said}

    @property
    def notes(self) -> list[str]:
        """What the numbers mean, and what was left out."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        by = self.by.replace("_", " ")
        if any(len(group.records) > 1 for group in self.groups):
            yield (
                "mean ± half-width of the 95 % confidence interval of the mean over seeds (Student's t); deviation is "
                "the standard deviation of the seeds. It covers other seeds, not other texts to validate on."
            )
        yield f"final {by}: of the whole validation split at the last step."
        yield (
            f"best {by}: the {'least' if less_is_better(self.by) else 'greatest'} of a run's evaluations, chosen by "
            "the validation split itself: optimistic, the more so the more there are. Verdicts are on the final."
        )
        tests = sum(verdict.difference is not None for verdict in self.verdicts)
        if tests:
            ways = {verdict.paired for verdict in self.verdicts if verdict.difference}
            how = {True: "paired by their seeds", False: "Welch's, as the seeds are not the same"}
            yield (
                "difference: the group's mean minus that of group 1; t-tests, "
                f"{' or '.join(how[way] for way in sorted(ways))}. Where no difference is shown there may be one, "
                "anywhere in the interval."
            )
            several = f", by Bonferroni's correction: intervals are at {100 - 5 / tests:.4g} %" if tests > 1 else ""
            yield f"If all groups are equal, a difference is reported in at most 5 % of comparisons{several}."
        if len(steps := {group.config["train"]["steps"] for group in self.groups}) > 1:
            yield f"Groups have different numbers of steps ({', '.join(f'{n:,}' for n in sorted(steps))})."
        if len({r.texts["tokenizer_sha256"] for g in self.groups for r in g.records}) > 1 and tests:
            yield "Tokenizers differ: a split that is the end of a corpus then begins at another place in the text."
        for group in self.groups:
            yield from (f"left out: {directory}: {why}" for directory, why in group.left_out.items())

    def __str__(self) -> str:
        return "\n\n".join([*self._tables(aligned_table, "{}:"), "\n".join(self.notes)])

    def markdown(self) -> str:
        notes = "\n".join(f"* {note}" for note in self.notes)
        return "\n\n".join([*self._tables(markdown_table, "**{}**"), notes])

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.markdown()

    def _tables(self, table: Callable[[Sequence[Mapping[str, Any]]], str], head: str) -> Iterator[str]:
        by = self.by.replace("_", " ")
        if found := self.differences:
            fields = [
                {"field": path} | {str(i): _short(told(value)) for i, value in enumerate(values, 1)}
                for path, values in found.items()
            ]
            yield head.format("What differs")
            yield table(fields)
            yield head.format("Groups")
        cells = []
        for row in self.rows:
            final, best = (_spread(row[f"{name}_{self.by}"], row[f"{name}_half_width"]) for name in ("final", "best"))
            deviation = "" if row["final_deviation"] is None else f"{row['final_deviation']:.4f}"
            cell = {
                "group": row["group"],
                "name": row["name"],
                "seeds": len(row["seeds"]),
                "steps": f"{row['steps']:,}",
            }
            cells.append(cell | {f"final {by}": final, "deviation": deviation, f"best {by}": best})
        yield table(cells)
        if self.verdicts:
            yield head.format("Against group 1")
            yield table(
                [
                    {
                        "group": row["group"],
                        "difference": _spread(row["difference"], row["difference_half_width"], "+"),
                        "p": "" if row["p_value"] is None else f"{row['p_value']:.2g}",
                        "verdict": row["verdict"],
                    }
                    for row in self.rows[1:]
                ]
            )

    def json(self) -> str:
        """One object: the rows, with each seed's numbers, what differs, and the notes."""
        rows = [
            row | {"runs": [r.directory for r in group.records], "left_out": group.left_out}
            | {"final": list(group.final(self.by).values()), "best": list(group.best(self.by).values())}
            for row, group in zip(self.rows, self.groups, strict=True)
        ]  # fmt: skip
        found = {"by": self.by, "groups": rows, "differences": self.differences, "notes": self.notes}
        return json.dumps(found, ensure_ascii=False)

    def csv(self) -> str:
        """A line for each run, with its final and best number and the fields that differ."""
        lines = []
        for i, group in enumerate(self.groups):
            fields = {path: told(values[i]) for path, values in self.differences.items()}
            for record in group.records:
                line = {"group": i + 1, "directory": record.directory, "seed": record.seed, "steps": record.steps}
                line |= {"final": group.final(self.by)[record.seed], "best": group.best(self.by)[record.seed]}
                lines.append(line | fields)
        if not lines:
            raise InputError(f"csv: no run has a final {self.by} yet; let one be finished")
        return csv_table(lines)

    def figure(self) -> Any:
        """A Matplotlib figure: each group's mean at every evaluation that its runs share, in a band as wide as the
        interval."""
        curves = {}
        for i, group in enumerate(self.groups, 1):
            found = [record.curve(self.by) for record in group.records]
            if steps := sorted(set.intersection(*map(set, found))) if found else []:
                points = [estimate([curve[step] for curve in found]) for step in steps]
                curves[f"{i} {group.name}"] = (
                    steps,
                    np.array([point.mean for point in points]),
                    np.array([point.half_width or 0.0 for point in points]),
                )
        figure, (axes,) = pictures.panels(1, 1)
        name = f"validation {self.by.replace('_', ' ')}" + " (nats per token)" * (self.by == "loss")
        pictures.bands(axes, curves, "step", name, "mean of the seeds, and its 95 % confidence interval")
        return figure


def _spread(mean: float | None, half_width: float | None, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean:{sign}.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
