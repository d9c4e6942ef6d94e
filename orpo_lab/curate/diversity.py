"""How diverse prompts are: near-duplicates, and coverage by clusters; needs the extra `curate`.

A cluster holds prompts with similar words: k-means on TF-IDF weights, whose 50 main directions are
kept (latent semantic analysis). Clusters say where prompts crowd and what they are about. Their
number is chosen by the number of prompts, so figures of sets of very different sizes cannot be
compared.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orpo_lab import program
from orpo_lab.curate.folder import Prompt
from orpo_lab.data.near_duplicates import near_duplicates
from orpo_lab.data.pairs import text_of
from orpo_lab.errors import UserError

# A well-known article on ORPO advises at least as many prompts for general use
ADVISED = 10_000
# Of sqrt(N / 2) clusters, a usual rule of thumb, no more than this
MAX_CLUSTERS = 100
NUM_DIRECTIONS = 50
MAX_WORDS = 20_000
# Characters of a prompt that are looked at, from its end: the last question
MAX_CHARACTERS = 4000
NUM_TOP_WORDS, NUM_EXAMPLES, EXAMPLE_LENGTH = 5, 3, 80
NUM_SHOWN = 8
# Marks of Indic and other scripts are a part of their words, and no \w
_WORD = re.compile(r"[\w\u0300-\u1fff]{2,}")
SEED = 1


@dataclass(frozen=True)
class Cluster:
    """Prompts with similar words: how many, the words that stand out, and typical prompts."""

    size: int
    top_words: list[str]
    examples: list[str]


@dataclass(frozen=True)
class Diversity:
    """How diverse prompts are.

    Attributes:
        num_prompts: all prompts.
        near_duplicates: groups of ids of prompts that are nearly the same; the first one of each
            group is the one to keep.
        clusters: the largest first.
    """

    num_prompts: int
    near_duplicates: list[list[str]]
    clusters: list[Cluster]

    @property
    def num_repeated(self) -> int:
        """The number of prompts that could go: all but one of each group of near-duplicates."""
        return sum(len(group) - 1 for group in self.near_duplicates)

    @property
    def largest_share(self) -> float:
        """The share of the prompts that is in the largest cluster; 0: there are no prompts."""
        sizes = [cluster.size for cluster in self.clusters]
        return max(sizes) / self.num_prompts if sizes else 0.0

    @property
    def num_effective(self) -> float:
        """exp(entropy) of the clusters' shares: as many clusters of one size are as diverse."""
        shares = [cluster.size / self.num_prompts for cluster in self.clusters]
        return math.exp(-sum(share * math.log(share) for share in shares))

    @property
    def advice(self) -> str | None:
        """What to do about too few prompts; None: there are enough."""
        if self.num_prompts >= ADVISED:
            return None
        return (
            f"advice: {self.num_prompts} prompts are few for a model of general use, for which a "
            f"well-known article advises {ADVISED} or more; for one narrow task fewer may do"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain data, as JSON has it."""
        return asdict(self) | {
            "num_repeated": self.num_repeated,
            "largest_share": self.largest_share,
            "num_effective": self.num_effective,
            "advice": self.advice,
        }


def measure(prompts: Sequence[Prompt]) -> Diversity:
    """Measure how diverse prompts are; the same prompts give the same result.

    Raises:
        UserError: the extra `curate` is not installed.
    """
    texts = [text_of(prompt.messages)[-MAX_CHARACTERS:] for prompt in prompts]
    groups = near_duplicates(texts)
    return Diversity(
        num_prompts=len(prompts),
        near_duplicates=[[prompts[place].id for place in group] for group in groups],
        clusters=clusters(texts),
    )


def clusters(texts: Sequence[str]) -> list[Cluster]:
    """Return the clusters of texts, the largest first.

    Raises:
        UserError: the extra `curate` is not installed.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.preprocessing import normalize
    except ImportError as error:
        raise UserError(
            f"clusters need scikit-learn, which is not installed: {program.install('curate')}"
        ) from error
    number = min(MAX_CLUSTERS, round(math.sqrt(len(texts) / 2)))
    if number < 2:
        return [_cluster(texts, [])] if texts else []
    vectorizer = CountVectorizer(analyzer=_terms, max_features=MAX_WORDS, dtype=np.float32)
    weights = vectorizer.fit_transform(texts)
    words = vectorizer.get_feature_names_out()
    num_with = np.bincount(weights.indices, minlength=len(words))
    # A word of all prompts tells no cluster from another, nor does a word of a single prompt
    told = np.where(num_with > 1, np.log(len(texts) / num_with), 0)
    weights.data = (1 + np.log(weights.data)) * told[weights.indices]
    if not weights.data.any():
        return [_cluster(texts, [])]
    directions = min(NUM_DIRECTIONS, len(words), len(texts))
    places = TruncatedSVD(directions, random_state=SEED).fit_transform(normalize(weights))
    # Prompts are compared by their words and not by their length
    places = normalize(places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct prompts than clusters
        means = MiniBatchKMeans(number, n_init=10, random_state=SEED).fit(places)
    usual = weights.mean(0)
    found = []
    for label in np.unique(means.labels_):
        members = np.flatnonzero(means.labels_ == label)
        above = np.asarray(weights[members].mean(0) - usual).ravel()
        heaviest = above.argsort(kind="stable")[::-1][:NUM_TOP_WORDS]
        nearest = means.transform(places[members])[:, label].argsort(kind="stable")
        typical = [texts[place] for place in members[nearest]]
        found.append(_cluster(typical, [str(word) for word in words[heaviest]]))
    return sorted(found, key=lambda cluster: -cluster.size)


def _terms(text: str) -> list[str]:
    """Return the words of a text; of a text without spaces, all runs of two characters."""
    text = text.casefold()
    if " " in text:
        return _WORD.findall(text) or [text]
    return [text[start : start + 2] for start in range(max(len(text) - 1, 1))]


def _cluster(typical: Sequence[str], top_words: list[str]) -> Cluster:
    """Return a cluster of texts, the most typical text first."""
    examples = [" ".join(text.split())[:EXAMPLE_LENGTH] for text in typical[:NUM_EXAMPLES]]
    return Cluster(len(typical), top_words, examples)


def lines(found: Diversity) -> list[str]:
    """Return what the terminal shows of a diversity."""
    said = [
        f"{found.num_prompts} prompts; {found.num_repeated} are near-duplicates of another",
        f"{len(found.clusters)} clusters, as diverse as {found.num_effective:.1f} of one size; the "
        f"largest holds {100 * found.largest_share:.0f} %",
    ]
    for cluster in found.clusters[:NUM_SHOWN]:
        words = ", ".join(cluster.top_words)
        said.append(f"  {cluster.size:6}  {words:40}  {cluster.examples[0]}")
    if len(found.clusters) > NUM_SHOWN:
        said.append(f"  and {len(found.clusters) - NUM_SHOWN} smaller ones")
    return said + ([found.advice] if found.advice else [])
