"""Find texts that are nearly the same, by MinHash (Broder 1997); needs the extra `curate`.

Two texts are compared by their sets of shingles: all runs of three words. The likeness of two texts
is the Jaccard index: the number of shingles that both have, divided by the number that at least one
of the two has.
"""

from collections.abc import Iterable

import numpy as np
from xxhash import xxh3_128_digest, xxh32_intdigest

from orpo_lab import program
from orpo_lab.data.rows import normalize
from orpo_lab.errors import UserError

# Words of a shingle; characters, if the text has no spaces
SHINGLE = 3
# Hash functions of a sketch. The likeness that two sketches give has a standard error of at most
# 1 / (2 sqrt(128)) = 0.044
NUM_PERMUTATIONS = 128
# Texts of at least this likeness are nearly the same
THRESHOLD = 0.8
SEED = 1
# What a wrong candidate and a missed candidate weigh. Sketches find the wrong ones out, so only the
# missed ones matter: 5 % at the threshold, below 1 % from 0.85 on (equal weights: 60 and 31 %)
WEIGHTS = (0.05, 0.95)


def near_duplicates(texts: Iterable[str]) -> list[list[int]]:
    """Return the groups of texts that are nearly the same, as places in `texts`, in their order.

    Every text of a group resembles the first text of the group. So a chain of small changes does
    not make one group of all texts. Of several such groups a text joins the one that it resembles
    most. Texts that are equal after `normalize` are always in one group. A text that resembles no
    other text is in no group.

    Memory grows by about 7 KB for each group and each text that resembles no other.

    Raises:
        UserError: the extra `curate` is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise UserError(
            f"near-duplicates need datasketch, which is not installed: {program.install('curate')}"
        ) from error
    blank = MinHash(NUM_PERMUTATIONS, seed=SEED, hashfunc=xxh32_intdigest)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, weights=WEIGHTS)
    groups: list[list[int]] = []
    sketches: list[np.ndarray] = []  # of the first text of each group
    known: dict[bytes, int] = {}
    for place, text in enumerate(texts):
        normalized = normalize(text)
        digest = xxh3_128_digest(_bytes(normalized))
        if digest not in known:
            sketch = blank.copy()
            sketch.update_batch(shingles(normalized))
            group = _most_alike(sketch.hashvalues, index.query(sketch), sketches)
            if group is None:
                group = len(groups)
                groups.append([])
                sketches.append(sketch.hashvalues)
                index.insert(group, sketch, check_duplication=False)
            known[digest] = group
        groups[known[digest]].append(place)
    return [group for group in groups if len(group) > 1]


def shingles(normalized: str) -> set[bytes]:
    """Return the shingles of a text in the form of `normalize`; a short text is one shingle."""
    units = list(map(_bytes, normalized.split(" ") if " " in normalized else normalized))
    if len(units) < SHINGLE:
        return {b" ".join(units)}
    return set(map(b" ".join, zip(*(units[start:] for start in range(SHINGLE)), strict=False)))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # which keeps half characters apart


def _most_alike(sketch: np.ndarray, groups: list[int], sketches: list[np.ndarray]) -> int | None:
    """Return the group whose sketch is the most alike; None: none is alike enough."""
    if not groups:
        return None
    num_equal = {group: np.count_nonzero(sketches[group] == sketch) for group in sorted(groups)}
    best = max(num_equal, key=num_equal.__getitem__)
    return best if num_equal[best] >= THRESHOLD * len(sketch) else None
