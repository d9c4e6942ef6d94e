"""The data card of the pairs, `card.md`, in the format of the Hugging Face hub.

The card names no annotator: people are numbered in the order of their first votes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from orpo_lab import program
from orpo_lab.curate import diversity
from orpo_lab.curate.agreement import Agreement, alpha_text, measure, percent
from orpo_lab.curate.rules import ALL, DROPPED, Rule
from orpo_lab.records.markdown import fenced

if TYPE_CHECKING:
    from orpo_lab.curate.pairs import Curation, Pairs

# The hub's names of sizes, and the number of pairs that each is below
SIZES = {
    "n<1K": 10**3,
    "1K<n<10K": 10**4,
    "10K<n<100K": 10**5,
    "100K<n<1M": 10**6,
    "n>1M": float("inf"),
}
# Settings of answers that differ from answer to answer
OF_ONE_ANSWER = ("seed",)


def text(curation: "Curation", made: "Pairs", rule: Rule, language: str | None) -> str:
    """Return the card.

    Args:
        curation: all that the folder holds.
        made: the pairs.
        rule: the rule that made them.
        language: code of the prompts' language; None: the card says nothing of it.
    """
    agreement = measure(curation.comparisons, curation.votes)
    sections = [
        f"# {curation.name}",
        f"{len(made.rows)} preference pairs: two answers of a language model to a prompt, and "
        "the one of them that people chose. Made with orpo_lab.",
        "## Counts",
        _table(("what", "number"), _counts(curation, made)),
        f"The rule: {_words(rule)}.",
        "## Agreement",
        _agreement(agreement),
        _annotators(curation, agreement),
        "## Answers",
        _answers(made.rows),
        length_bias(made.rows),
        "## Sources and licences",
        *_sources(made.rows),
        "## Diversity of the prompts",
        _diversity(curation, made.rows),
        "## Training on it",
        f"```bash\n{program.command('train')} "
        "model=smollm2_135m dataset=file dataset.train_path=pairs.jsonl\n```",
        "A row holds `prompt`, `chosen` and `rejected` as messages. `provenance` says where the "
        "prompt comes from, how the answers were made and how many annotators chose; training "
        "does not read it. All pairs of a prompt are held out together.",
    ]
    return f"---\n{_head(made.rows, language)}---\n" + "\n\n".join(sections) + "\n"


def licence_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the hub's licence of the rows: the one of all sources, or unknown, or other."""
    found = {row["provenance"]["licence"] for row in rows}
    if None in found:
        return "unknown"
    # The hub's names are in lower case
    return str(found.pop()).lower() if len(found) == 1 else "other"


def length_bias(rows: Sequence[dict[str, Any]]) -> str:
    """Say how often the longer answer is the chosen one; a model may learn length instead."""
    sizes = [[len(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows]
    differing = [chosen > rejected for chosen, rejected in sizes if chosen != rejected]
    share = sum(differing) / len(differing) if differing else None
    return (
        f"The longer answer, in characters, is the chosen one in {percent(share)} of the "
        f"{len(differing)} pairs whose answers differ in length. Who guesses the longer one is "
        "right as often."
    )


def _head(rows: Sequence[dict[str, Any]], language: str | None) -> str:
    size = next(name for name, end in SIZES.items() if len(rows) < end)
    head = {
        "license": licence_of(rows),
        **({"language": [language]} if language else {}),
        "size_categories": [size],
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "orpo"],
        "configs": [{"config_name": "default", "data_files": "pairs.jsonl"}],
    }
    return yaml.safe_dump(head, sort_keys=False)


def _counts(curation: "Curation", made: "Pairs") -> Iterator[tuple[str, int]]:
    yield "prompts", len(curation.prompts)
    yield "answers", len(curation.candidates)
    yield "comparisons", len(curation.comparisons)
    yield "votes", len(curation.votes)
    yield "**pairs**", len(made.rows)
    for reason, words in DROPPED.items():
        if made.dropped[reason]:
            yield f"left out: {words}", made.dropped[reason]


def _words(rule: Rule) -> str:
    weights = {"against": "counts against the chosen answer", "ignore": "does not count"}
    weights["veto"] = "drops the comparison"
    whose = "of people and LLM judges" if rule.judges else "of people"
    return (
        f"{rule.min_votes} votes {whose} or more, at least {percent(rule.majority)} of them for "
        f"the chosen answer, which leads by {rule.margin} or more; a tie {weights[rule.tie]}, a "
        f"vote that both are bad {weights[rule.both_bad]}"
    )


def _agreement(found: Agreement) -> str:
    return (
        "Krippendorff's alpha of the people, nominal, with a 95 % bootstrap interval over "
        f"comparisons: {alpha_text(found.alpha)} over all four choices (first, second, tie, "
        f"both bad), {alpha_text(found.alpha_decided)} over votes for an answer. It rests on "
        f"{found.num_shared} comparisons with two votes or more."
    )


def _annotators(curation: "Curation", found: Agreement) -> str:
    order = dict.fromkeys((vote.kind, vote.annotator) for vote in curation.votes)
    described = {(one.kind, one.name): one for one in found.annotators}
    rows = [
        (
            f"{kind} {number}",
            one.num_votes,
            percent(one.tie_share),
            percent(one.both_bad_share),
            percent(one.skip_share),
            percent(one.agreement),
            percent(one.self_agreement),
        )
        for kind in ALL
        for number, one in enumerate([described[key] for key in order if key[0] == kind], 1)
    ]
    heads = ("annotator", "votes", "tie", "both bad", "skip", "agrees with others", "with itself")
    return _table(heads, rows)


def _answers(rows: Sequence[dict[str, Any]]) -> str:
    made = Counter(
        ", ".join(
            f"{key} {value}"
            for key, value in row["provenance"][f"{side}_made_by"].items()
            if key not in OF_ONE_ANSWER and value is not None
        )
        for row in rows
        for side in ("chosen", "rejected")
    )
    return _table(("made by", "answers in pairs"), made.most_common())


def _sources(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = Counter((row["provenance"]["source"], row["provenance"]["licence"]) for row in rows)
    rows_of = [
        (source, licence or "**none given**", num) for (source, licence), num in found.most_common()
    ]
    table = _table(("source of the prompts", "licence", "pairs"), rows_of)
    said = [table, *licence_warnings(rows)]
    return [*said, "The licences of the models that wrote the answers hold for the answers, too."]


def licence_warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what has to be settled about licences before the pairs are published."""
    found = {(row["provenance"]["licence"], row["provenance"]["source"]) for row in rows}
    without = sorted(source for licence, source in found if licence is None)
    licences = sorted({licence for licence, _ in found if licence is not None})
    said = []
    if without:
        said.append(f"WARNING: no licence is given for {', '.join(without)}.")
    if len(licences) > 1:
        said.append(
            f"WARNING: the sources have different licences ({', '.join(licences)}); look whether "
            "these go together before you publish."
        )
    return said


def _diversity(curation: "Curation", rows: Sequence[dict[str, Any]]) -> str:
    kept = {row["provenance"]["prompt_id"] for row in rows}
    found = diversity.measure([prompt for prompt in curation.prompts if prompt.id in kept])
    return fenced("\n".join(diversity.lines(found))).strip()


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first hold figures."""
    body = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *body])
