"""Keys of `dataset=mixture`: pairs of several sources, each with its own columns and share."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from orpo_lab.config.checks import at_least, check
from orpo_lab.config.dataset import (
    ALL_FILES,
    Dataset,
    FileDataset,
    Files,
    HubDataset,
    PairColumns,
    TableDataset,
)
from orpo_lab.config.policy import location, setting, switch

# Where the sources of a mixture are given
SOURCES = "dataset.sources"


# What the columns of a source are where nothing else is said
PAIRS = asdict(PairColumns(prompt="prompt", chosen="chosen", rejected="rejected"))


def is_left_behind(key: str) -> bool:
    """Return whether a key is a column of pairs that another kind of columns has left behind.

    The columns of a source begin as those of pairs, and Hydra takes no key away.
    """
    return bool(re.fullmatch(rf"{re.escape(SOURCES)}\.\w+\.columns\.({'|'.join(PAIRS)})", key))


@dataclass(kw_only=True)
class MixedSource:
    """One source of a mixture: files, as for dataset=file, or a data set as for dataset=hub.

    A user names sources in YAML or on the command line, so no file of ours can give these values.
    """

    train_path: Files = location(ALL_FILES, default=None)
    eval_path: Files = location(ALL_FILES, default=None)
    path: str | None = location(ALL_FILES, default=None)
    revision: str | None = location(default=None)
    train_split: str = setting(default="train")
    eval_split: str | None = setting(default=None)
    # Columns, or the keys of PairColumns: OmegaConf takes no other kind in place of a default
    columns: Any = setting(factory=lambda: dict(PAIRS))
    transcripts: bool = setting(default=False)
    weight: float | None = setting(default=None)
    num_train: int | None = setting(default=None)
    max_repeats: int = setting(default=1)
    num_eval: int | None = setting(default=None)
    checker: str | None = setting(default=None)
    checker_pattern: str | None = setting(default=None)

    def check(self) -> None:
        """Check the values; a message names a key of a source as a key of `dataset`.

        Raises:
            ValueError: a value is out of range, or two values do not fit together.
        """
        check(
            (self.path is None) != (self.train_path is None),
            "give either dataset.train_path (files) or dataset.path (a data set of the hub)",
        )
        check(
            self.path is None or self.eval_path is None,
            "dataset.eval_path belongs to files; of a data set of the hub give dataset.eval_split",
        )
        check(
            self.path is not None or (self.eval_split is None and self.revision is None),
            "dataset.eval_split and dataset.revision belong to a data set of the hub; of files "
            "give dataset.eval_path",
        )
        check(
            self.weight is None or MIN_WEIGHT <= self.weight <= MAX_WEIGHT,
            f"dataset.weight={self.weight} must be at least {MIN_WEIGHT:g} and at most "
            f"{MAX_WEIGHT:g}",
        )
        at_least(
            1,
            dataset__num_train=self.num_train,
            dataset__max_repeats=self.max_repeats,
            dataset__num_eval=self.num_eval,
        )
        check(
            self.weight is None or self.num_train is None,
            "give either dataset.weight (a share) or dataset.num_train (a count)",
        )
        check(
            self.max_repeats == 1 or self.weight is not None or self.num_train is not None,
            f"dataset.max_repeats={self.max_repeats} fills up a share or a count; give "
            "dataset.weight or dataset.num_train",
        )


# Weights are read up to six digits behind the point
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
_OF_A_SOURCE = "|".join(field.name for field in fields(MixedSource))


def said_of(name: str, text: str) -> str:
    """Return a message about the keys of `dataset` as one about the keys of a source."""
    return re.sub(rf"\bdataset\.({_OF_A_SOURCE})\b", rf"{SOURCES}.{name}.\1", text)


@dataclass(kw_only=True)
class MixtureDataset(Dataset):
    """Pairs of several named sources."""

    sources: dict[str, MixedSource] = setting()
    as_messages: str = switch(unread_under={"dataset.as_messages": "false"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_messages = self.as_messages.lower()
        check(
            bool(self.sources),
            f"{SOURCES} is empty; name the sources, such as {SOURCES}.math.train_path=math.jsonl "
            f"{SOURCES}.chat.path=org/name",
        )
        self.sources = dict(sorted(self.sources.items()))
        for name in self.sources:
            check(
                bool(re.fullmatch(r"\w+", name)),
                f"{SOURCES} names '{name}'; a name is made of letters, digits and _",
            )
            self.of(name)
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        others = [name for name in self.sources if name not in weighted]
        check(
            not (weighted and others),
            f"{SOURCES}.{''.join(others[:1])} has no weight, and {''.join(weighted[:1])} has one; "
            "give all sources a weight or none",
        )
        check(
            bool(weighted) or self.num_train is None,
            f"dataset.num_train={self.num_train} is shared out by weights; give every source a "
            f"weight, or a count of its own ({SOURCES}.{next(iter(self.sources))}.num_train)",
        )

    def of(self, name: str) -> TableDataset:
        """Return a source as the data set that it would be on its own.

        Raises:
            ValueError: a key of the source is out of range.
        """
        source = self.sources[name]
        shared = {field.name: getattr(self, field.name) for field in fields(Dataset)}
        shared["num_train"] = source.num_train
        shared["num_eval"] = source.num_eval or self.num_eval
        own: dict[str, Any] = {
            "columns": source.columns,
            "transcripts": source.transcripts,
            "as_messages": self.as_messages,
            "checker": source.checker,
            "checker_pattern": source.checker_pattern,
        }
        try:
            source.check()
            if isinstance(source.columns, dict):
                check(
                    source.columns.keys() <= PAIRS.keys(),
                    f"dataset.columns has keys beside {', '.join(PAIRS)}; another kind of rows is "
                    "named, such as dataset.columns=ranked",
                )
                own["columns"] = PairColumns(**PAIRS | source.columns)
            if source.path is None:
                places = {key: getattr(source, key) for key in ("train_path", "eval_path")}
                return FileDataset(**shared, **own, **places)
            keys = ("path", "revision", "train_split", "eval_split")
            return HubDataset(**shared, **own, **{key: getattr(source, key) for key in keys})
        except ValueError as error:
            raise ValueError(said_of(name, str(error))) from error
