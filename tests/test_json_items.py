"""Lists of JSON files, item by item: the items, and the refusals, of `json.loads`."""

import io
import json
import random
from typing import Any

import pytest

from orpo_lab.data import json_items
from orpo_lab.data.json_items import BLOCK, NotJsonError, items

SCALARS = [None, True, -1.5e-7, 10**30, 7, -0.0, 'é\ud800"\\\n', "", float("inf"), float("nan")]


def made_up(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(4) if depth < 4 else 0:
        case 1:
            return [made_up(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 2:
            return {str(key): made_up(rng, depth + 1) for key in range(rng.randrange(4))}
    return rng.choice(SCALARS)


@pytest.mark.parametrize("block", [1, 2, 7, BLOCK])
def test_items_are_those_of_the_whole_text(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_items, "BLOCK", block)
    rng = random.Random(0)
    for number in range(60):
        rows = [made_up(rng) for _ in range(rng.randrange(6))]
        form: dict[str, Any] = {"indent": number % 3 or None, "ensure_ascii": number % 2 == 0}
        # NaN is not itself
        whole = items(io.StringIO(json.dumps(rows, **form)))
        assert repr(list(whole)) == repr([(None, row) for row in rows])
        several = {"version": made_up(rng, 4), "a": rows, "b.c": {"a": rows}, "d": rows[:2]}
        found = [*items(io.StringIO(json.dumps(several, **form)))]
        assert repr(found) == repr(
            [*(("a", row) for row in rows), *(("d", row) for row in rows[:2])]
        )


@pytest.mark.parametrize("block", [1, BLOCK])
@pytest.mark.parametrize(
    "text",
    [
        *('[{"a":1}] x', '[{"a":1}]\n[{"a":1}]', '{"a":1}\n{"a":2}', '[{"a":1},{"a":', "", "[1,]"),
        *("[01]", '["x\ny"]', '{"a" 1}', "{1:2}", "[1 2]", '["x]', '{"a":[1,2}', "nul", "[,]"),
        '{"a":1,}',
    ],
)
def test_what_is_no_json_is_refused_with_its_line(
    text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_items, "BLOCK", block)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(NotJsonError) as refused:
        list(items(io.StringIO(text)))
    where = f"line {expected.value.lineno}, character {expected.value.pos}"
    assert str(refused.value).endswith(where)


class Counted(io.StringIO):
    """A text that counts the characters that were read of it."""

    num_read = 0

    def read(self, size: int | None = -1) -> str:
        found = super().read(size)
        self.num_read += len(found)
        return found


def test_no_more_is_read_than_an_item_needs() -> None:
    rows = [{"text": "word " * 100}] * 2000
    text = Counted(json.dumps({"data": rows}))
    found = items(text)
    assert next(found) == ("data", rows[0])
    assert text.num_read == BLOCK
    # An error in the first item shows before the rest is read
    text = Counted('[{"text": word}, ' + json.dumps(rows)[1:])
    with pytest.raises(NotJsonError, match="Expecting value: line 1, character 10"):
        list(items(text))
    assert text.num_read == BLOCK
