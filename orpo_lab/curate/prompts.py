"""Take prompts from files: `python -m orpo_lab curate prompts FOLDER FILE...`.

A file is one that training reads too: its rows hold a prompt, or a pair or a conversation that
begins with a prompt, or a tree of OpenAssistant. A prompt that is there already is left out, so a
second file adds to the first, and the same command twice adds nothing. At its end the step says how
diverse all prompts are; without a file it does nothing else.
"""

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orpo_lab.config.dataset import PairColumns
from orpo_lab.curate import diversity
from orpo_lab.curate.folder import PROMPTS, Prompt, append, held, prompt_id, read_prompts
from orpo_lab.data import forms
from orpo_lab.data.faults import Fault, Tally
from orpo_lab.data.files import Source, read_files
from orpo_lab.data.pairs import CONTEXT, Content, Message, Pair, find_faults, text_of
from orpo_lab.data.recognise import SYSTEM
from orpo_lab.data.rows import normalize
from orpo_lab.errors import UserError

# The roles and normalized texts of a prompt's messages
Key = tuple[tuple[str, str], ...]

# Where a prompt is looked for without --column, the first that is there
COLUMNS = (
    *("prompt", "messages", "conversations", "conversation", "question", "instruction", "context"),
)
# Columns that belong to the prompt where a row has them; `input` follows an instruction
BESIDE = ("system", "history", "input")
# Tokens that control the model are looked for by training, which knows the model
_NO_TOKENS = re.compile("(?!)")
_YES, _NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="rows as training reads them (docs/data.md)"
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help=f"the column of strings or messages (default: the first of {', '.join(COLUMNS)} that "
        "is there, or what the two conversations of a pair share)",
    )
    parser.add_argument(
        "--num", type=int, metavar="N", help="draw N prompts of each file (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--licence", help="the licence of the prompts, for the data card")
    parser.add_argument(
        "--source", help="where the prompts come from, for the card (default: the file's name)"
    )


def run(options: argparse.Namespace) -> None:
    """Add the prompts of files to the folder, and print how many, and how diverse all are.

    Raises:
        UserError: a file cannot be read or holds no prompt, or an argument is out of range.
        OSError: the folder cannot be written to.
    """
    if options.num is not None and options.num < 1:
        raise UserError(f"--num {options.num} must be at least 1")
    # Before the folder is made: a file may be refused
    drawn = []
    for file in options.files:
        found = read(file, options.column, options.source, options.licence)
        drawn.append((file, draw(found, options.num, options.seed)))
    present = _add(options.folder, drawn) if drawn else read_prompts(options.folder)
    path = options.folder / PROMPTS
    print("\n".join([f"{path}:", *diversity.lines(diversity.measure(present))]))


def _add(folder: Path, drawn: Sequence[tuple[str, list[Prompt]]]) -> list[Prompt]:
    """Add the prompts of files that are not there yet, print how many, and return all prompts."""
    with held(folder):
        path = folder / PROMPTS
        present = read_prompts(folder) if path.is_file() else []
        for file, prompts in drawn:
            new = distinct(prompts, set(map(_key, present)))
            append(path, new)
            present += new
            there = len(prompts) - len(new)
            said = f", {there} are there already or twice" if there else ""
            print(f"{file}: {len(new)} prompts added{said}")
    return present


def read(file: str, column: str | None, source: str | None, licence: str | None) -> list[Prompt]:
    """Return the prompts of a file, and print what is left out.

    Raises:
        UserError: the file cannot be read, or holds no prompt.
    """
    rows, left_out, prompts = _open(file, column), Tally(), []
    num_with_context = 0
    for number, row in rows.rows:
        try:
            messages = to_prompt(row, column)
        except Fault as fault:
            left_out.add(fault.name, number, fault.detail)
        else:
            name = source or Path(file).name
            prompts.append(Prompt(prompt_id(messages), messages, name, number, licence))
            num_with_context += any(row.get(name) for name in CONTEXT)
    if num_with_context:
        unread = " or ".join(CONTEXT)
        print(f"{file}: {num_with_context} prompts have {unread} beside them, which are not read")
    if not prompts:
        raise UserError(f"{file} holds no prompt ({left_out}); {left_out.examples()}")
    if left_out:
        print(f"{file}: left out {left_out}; {left_out.examples()}")
    return prompts


def _open(file: str, column: str | None) -> Source:
    """Return the rows of a file; of a table, the columns that the prompt is read from."""
    answers = ["chosen", "rejected"]
    tried = [["prompt", *answers], *([name] for name in COLUMNS), answers]
    if column:
        tried = [[column]]
    for columns in tried:
        rows = read_files(file, forms.Names(tuple(columns), (*columns, *BESIDE)))
        try:
            first = next(rows.rows)
        except UserError as error:
            if "lacks column" not in str(error):
                raise
            continue
        return Source(rows.name, rows.unit, itertools.chain([first], rows.rows))
    names = f"column {column}" if column else f"column {', '.join(COLUMNS)}, chosen or rejected"
    raise UserError(f"{file} has no {names}; name the column of the prompts with --column")


def to_prompt(row: Any, column: str | None = None) -> list[Message]:
    """Return the messages of a row's prompt; they end with the user's turn.

    Args:
        row: a row as training reads it, or the `Fault` in its place.
        column: the column of the prompt; None: the first of COLUMNS that is there, or what the two
            conversations of a pair share.

    Raises:
        Fault: there is no prompt, or training would leave the prompt out.
    """
    if isinstance(row, Fault):
        raise row
    if not isinstance(row, Mapping):
        raise Fault("wrong_type", "is not an object with columns")
    pair = _with_any_answers(row, column)
    messages = _messages(pair.prompt)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    # Which answer of the row is the better one does not matter to its prompt
    ignored = pair.ignored if pair.ignored in SYSTEM else ""
    for fault in find_faults(Pair(messages, _YES, _NO, ignored=ignored), _NO_TOKENS):
        raise fault
    return messages


def _messages(prompt: Content) -> list[Message]:
    """Return a prompt as messages; a transcript may end with a turn of either side."""
    if not isinstance(prompt, str):
        return [*prompt]
    if not forms.is_transcript_text(prompt):
        return [{"role": "user", "content": prompt}]
    try:
        return forms.to_messages(prompt, "the prompt")
    except Fault as fault:
        if fault.name != "no_answer":
            raise
        return forms.to_messages(f"{prompt}\n\nAssistant:", "the prompt")


def _with_any_answers(row: Mapping[str, Any], column: str | None) -> Pair:
    """Return a pair whose prompt is the row's, read as training reads it; see `to_prompt`."""
    beside = {name: name for name in BESIDE[:2] if row.get(name)}
    name = column or next((name for name in COLUMNS if name in row), None)
    if column is None and name in (None, "prompt") and {"chosen", "rejected"} <= row.keys():
        return _of_pair(row, _columns(name, beside))
    if name is None or name not in row:
        present = ", ".join(map(str, sorted(row)[:20]))
        detail = f"lacks column {name or COLUMNS[0]} (it has {present})"
        raise Fault("missing_column", f"{detail}; name the right one with --column")
    if name == "instruction" and row.get("input"):
        beside["input"] = "input"
    asked, columns = {**row, name: _of_tree(row[name]) or row[name]}, _columns(name, beside)
    return forms.pair_of(asked, columns, forms.to_prompt(asked, columns), "yes", "no")


def _of_pair(row: Mapping[str, Any], columns: PairColumns) -> Pair:
    """Return a pair; without a prompt of its own it must be two conversations that begin alike.

    Two texts may begin alike by chance, so what they share is no prompt.
    """
    if columns.prompt or not isinstance(row["chosen"], str):
        return forms.to_pair(row, columns)
    if forms.is_transcript_text(row["chosen"]):
        return forms.from_transcripts(row, columns)
    detail = "has no prompt beside two texts; name the column of the prompts with --column"
    raise Fault("missing_column", detail)


def _columns(prompt: str | None, beside: dict[str, str]) -> PairColumns:
    return PairColumns(prompt=prompt, chosen="chosen", rejected="rejected", **beside)


def _of_tree(value: Any) -> str:
    """Return the first message of an OpenAssistant tree; empty: the value is not a good tree."""
    if not (isinstance(value, Mapping) and isinstance(value.get("text"), str)):
        return ""
    is_good = value.get("review_result", True) and not value.get("deleted")
    return value["text"] if is_good else ""


def draw(prompts: list[Prompt], num: int | None, seed: int) -> list[Prompt]:
    """Return `num` distinct prompts, drawn by the seed, in their order; None: all, as they are.

    What is drawn does not depend on what the folder holds. So the same draw twice is the same.

    Raises:
        UserError: there are fewer distinct prompts.
    """
    if num is None:
        return prompts
    different = distinct(prompts, set())
    if num > len(different):
        raise UserError(f"--num {num} is more than the {len(different)} distinct prompts there are")
    places = np.random.default_rng(seed).permutation(len(different))[:num]
    return [different[place] for place in sorted(places)]


def distinct(prompts: list[Prompt], seen: set[Key]) -> list[Prompt]:
    """Return the prompts that differ in more than case and white space from earlier ones.

    Args:
        prompts: in their order.
        seen: keys of prompts that come earlier.
    """
    by_key: dict[Key, Prompt] = {}
    for prompt in prompts:
        by_key.setdefault(_key(prompt), prompt)
    return [prompt for key, prompt in by_key.items() if key not in seen]


def _key(prompt: Prompt) -> Key:
    return tuple((message["role"], normalize(text_of([message]))) for message in prompt.messages)
