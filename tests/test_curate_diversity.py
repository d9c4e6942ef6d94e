"""Diversity of prompts: near-duplicates, and clusters of what they are about."""

import json
import random

import pytest

from orpo_lab.curate import diversity
from orpo_lab.curate.diversity import ADVISED, clusters, lines, measure
from orpo_lab.curate.folder import Prompt

TOPICS = {
    "baking": "flour oven bread dough butter yeast crust bake loaf sugar",
    "orbits": "planet orbit star moon gravity comet telescope mass galaxy light",
    "verses": "poem verse rhyme sonnet stanza metre poet ode ballad lyric",
    "courts": "judge court appeal verdict lawyer jury trial statute plea witness",
}


def about(topic: str, num: int, seed: int) -> list[str]:
    """Return questions about a topic, in the same words of asking."""
    draws = random.Random(seed)
    words = TOPICS[topic].split()
    return [f"please tell me about the {' '.join(draws.sample(words, 5))}" for _ in range(num)]


def prompts(texts: list[str]) -> list[Prompt]:
    return [
        Prompt(str(number), [{"role": "user", "content": text}], "texts", number)
        for number, text in enumerate(texts)
    ]


def test_clusters_are_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "MAX_CLUSTERS", 4)
    sizes = {"baking": 50, "orbits": 30, "verses": 20, "courts": 10}
    texts = [text for topic, num in sizes.items() for text in about(topic, num, seed=1)]
    random.Random(0).shuffle(texts)
    found = clusters(texts)
    assert [cluster.size for cluster in found] == list(sizes.values())
    for cluster, topic in zip(found, sizes, strict=True):
        assert set(cluster.top_words) <= set(TOPICS[topic].split())
        assert len(cluster.examples) == 3
    assert clusters(texts) == found


def test_the_effective_number_of_clusters_is_that_of_even_ones() -> None:
    def effective(*sizes: int) -> float:
        of_sizes = [diversity.Cluster(size, [], []) for size in sizes]
        return diversity.Diversity(sum(sizes), [], of_sizes).num_effective

    assert effective(7, 7, 7) == pytest.approx(3)
    assert effective(100) == pytest.approx(1)
    # exp of the entropy of 3/4 and 1/4, by hand
    assert effective(30, 10) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_near_duplicates_are_named_by_their_ids() -> None:
    text = " ".join(f"word{number}" for number in range(60))
    found = measure(prompts(["other", text, "another one", text + " more", text.upper()]))
    assert found.near_duplicates == [["1", "3", "4"]]
    assert found.num_repeated == 2
    assert found.as_json()["num_repeated"] == 2
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["alone"],
        ["the same words"] * 40,
        ["?!", "...", ""] * 20,
        ["字と詞を書く問題"] * 9 + ["別"],
    ],
    ids=["none", "one", "all the same", "no words", "no spaces"],
)
def test_odd_prompts_have_clusters_that_hold_all_of_them(texts: list[str]) -> None:
    found = measure(prompts(texts))
    assert sum(cluster.size for cluster in found.clusters) == len(texts)
    assert found.largest_share <= 1
    assert lines(found)


def test_words_of_every_script_stay_whole() -> None:
    texts = ["समस्या हल करो", "समस्या क्या है", "कविता लिखो अब", "कविता सुनाओ अब"] * 3
    (words,) = {word for cluster in clusters(texts) for word in cluster.top_words if "कवि" in word}
    assert words == "कविता"


def test_few_prompts_get_advice_and_many_do_not() -> None:
    few, many = (diversity.Diversity(num, [], []) for num in (ADVISED - 1, ADVISED))
    assert few.advice is not None
    assert few.advice.startswith("advice: 9999 prompts are few")
    assert few.advice in lines(few)
    assert many.advice is None
