"""What a preview shows: `preview.html`, which opens offline, and the lines for a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from orpo_lab import program
from orpo_lab.compare.verdict import CONFIDENCE
from orpo_lab.preview.rows import Part, Piece
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.records.templates import environment

Table = list[dict[str, str]]

# How a terminal with colours shows tokens: in the loss, and special. Without colours supervised
# text stands between MARKS
GREEN, REVERSED, PLAIN = "\x1b[32m", "\x1b[7m", "\x1b[0m"
MARKS = ("\u27e6", "\u27e7")
# The longest text of a prompt that is quoted as a near-duplicate, in characters
NUM_QUOTED = 200


@dataclass(frozen=True)
class Preview:
    """Everything that is shown."""

    figures: dict[str, Any]
    """What `--json` prints; docs/data.md explains each key."""
    rows: list[list[Part]]


def write(preview: Preview, folder: Path) -> Path:
    """Write `preview.html` into a folder, and return the file.

    Raises:
        OSError: the folder cannot be written to.
    """
    context = {
        "rows": preview.rows,
        "command": _command(preview.figures),
        "tables": tables(preview.figures),
        "said": said(preview.figures),
        "examples": _examples(preview.figures),
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = environment().get_template("preview.html.jinja").render(context)
    RunFolder(folder).write("preview.html", page)
    return folder / "preview.html"


def text(preview: Preview, *, has_colour: bool) -> list[str]:
    """Return the lines for a terminal."""
    lines = list(_row_lines(preview.rows, has_colour=has_colour))
    for title, table in tables(preview.figures).items():
        lines += ["", title, "", *aligned(table)]
    lines += ["", *said(preview.figures)]
    for one, other in _examples(preview.figures):
        lines += [f"  {one!r}", f"  {other!r}", ""]
    return lines


def _row_lines(rows: list[list[Part]], *, has_colour: bool) -> Iterator[str]:
    marked = "green" if has_colour else "between " + " and ".join(MARKS)
    if rows:
        yield f"The first {len(rows)} training rows. What the loss covers is {marked}."
    for number, parts in enumerate(rows, start=1):
        for part in parts:
            yield f"\n--- row {number}, {part.name}: {part.num_tokens} tokens"
            yield _in_colours(part.pieces) if has_colour else _in_marks(part.pieces)
            yield f"    {boundary(part)}"


def _in_colours(pieces: list[Piece]) -> str:
    styled = [
        (GREEN * piece.is_supervised + REVERSED * piece.is_special, piece.text) for piece in pieces
    ]
    return "".join(f"{style}{text}{PLAIN}" if style else text for style, text in styled)


def _in_marks(pieces: list[Piece]) -> str:
    begin, end = MARKS
    shown = ""
    for is_supervised, group in groupby(pieces, lambda piece: piece.is_supervised):
        text = "".join(piece.text for piece in group)
        shown += f"{begin}{text}{end}" if is_supervised else text
    return shown


def boundary(part: Part) -> str:
    """Return the first and the last tokens of a part, each with its id."""
    first = f"begins with {', '.join(part.first)}; " if part.first else ""
    return f"{first}ends with {', '.join(part.last)}"


def _command(figures: dict[str, Any]) -> str:
    return " ".join([program.command("preview"), *figures["overrides"]])


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """Return the tables by their titles, as text by column name."""
    lengths = [
        {"split": split, "part": part, **{key: f"{value:,}" for key, value in values.items()}}
        for split, found in figures["splits"].items()
        for part, values in found["lengths"].items()
    ]
    fates = [
        {key: f"{value:,}" for key, value in row.items()}
        | {"": "configured" * (row["max_length"] == figures["max_length"])}
        for row in figures["candidates"]
    ]
    return {
        "Lengths in tokens, before any cut": lengths,
        f"Training rows by dataset.max_length, with dataset.overlong={figures['overlong']}": fates,
        "Rows with a fault": list(_faults(figures)) or [{"": "none"}],
    }


def _faults(figures: dict[str, Any]) -> Iterator[dict[str, str]]:
    for split, found in figures["splits"].items():
        for fate in ("dropped", "kept"):
            for fault, entry in found["report"][fate].items():
                yield {
                    "split": split,
                    "fault": fault,
                    "": fate,
                    "rows": f"{entry['num']:,}",
                    "example": entry.get("example", ""),
                }


def said(figures: dict[str, Any]) -> list[str]:
    """Return the rest of the figures in sentences."""
    splits = figures["splits"].items()
    kept = ", ".join(f"{split} {found['report']['num_kept']:,}" for split, found in splits)
    cut = ", ".join(f"{split} {found['report']['num_cut']:,}" for split, found in splits)
    return [
        f"Rows that are used: {kept}. Of these are cut: {cut}.",
        *_said_of_duplicates(figures["near_duplicates"]),
        *_said_of_bias(figures["length_bias"]),
    ]


def _said_of_duplicates(found: dict[str, Any]) -> list[str]:
    if "missing" in found:
        return [f"Near-duplicate prompts are not counted: {found['missing']}."]
    return [
        f"Of {found['num_prompts']:,} different training prompts {found['num_near_duplicates']:,} "
        f"are nearly the same as an earlier one. Of {found['num_held_out']:,} held-out prompts "
        f"{found['num_held_out_near_train']:,} are nearly the same as a training prompt."
    ]


def _said_of_bias(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["The training rows hold no pairs, so there is no length bias to measure."]
    longer, right = found["longer_is_chosen"], found["length_guess_accuracy"]
    return [
        f"The longer answer is the chosen one in {_interval(longer)} of the training pairs "
        f"({found['num_longer']:,} longer, {found['num_shorter']:,} shorter; {found['num_ties']:,} "
        "of one length are left out).",
        f"A guess by length alone (the {found['rule']} answer) is right in {_interval(right)} of "
        f"{found['num_held_out']:,} held-out pairs; of two answers of one length half counts. "
        "A model that has learnt the preference has to do better. "
        f"In brackets: {100 * CONFIDENCE:.0f} % intervals over pairs.",
    ]


def _interval(found: dict[str, float]) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _examples(figures: dict[str, Any]) -> list[list[str]]:
    """Return pairs of prompts that are nearly the same."""
    pairs = figures["near_duplicates"].get("examples", [])
    return [[_quoted(prompt) for prompt in pair] for pair in pairs]


def _quoted(prompt: str) -> str:
    return prompt if len(prompt) <= NUM_QUOTED else f"... {prompt[-NUM_QUOTED:]}"


def aligned(table: Table) -> list[str]:
    """Return a table as lines with aligned columns."""
    cells = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
