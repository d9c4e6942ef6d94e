"""Prompts from files, and answers of a local model: drawn right, and the same after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo_lab.__main__ import main
from orpo_lab.curate import candidates, folder
from orpo_lab.curate.ask import Answer, Request
from orpo_lab.curate.candidates import compare, seed_of, spread
from orpo_lab.curate.folder import (
    CANDIDATES,
    PROMPTS,
    Candidate,
    Prompt,
    append,
    prompt_id,
    read_candidates,
    read_prompts,
)
from orpo_lab.curate.local import Local, sample
from orpo_lab.curate.prompts import to_prompt
from orpo_lab.curate.store import Store
from orpo_lab.data.faults import Fault
from orpo_lab.errors import UserError
from tests.conftest import ROOT

TINY = str(ROOT / "orpo_lab" / "tiny")
QUESTIONS = [
    "what is 31 plus 7?",
    "hello! a small question: what is 12 minus 5? answer only.",
    "which is larger, 31 or 70?",
    "spell tree backwards.",
    "what comes after 8?",
]
BRIEF = {"role": "system", "content": "Be brief."}
ANSWER = [{"role": "assistant", "content": "a"}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tiny() -> Local:
    return Local(TINY, None, "fp32", 16)


@pytest.fixture
def curation(tmp_path: Path) -> Path:
    """A folder with prompts."""
    prompts = [Prompt(prompt_id(asked(q)), asked(q), "x", n) for n, q in enumerate(QUESTIONS)]
    append(tmp_path / PROMPTS, prompts)
    return tmp_path


@pytest.fixture
def answering(tiny: Local, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the step with the embedded model, which is loaded once."""
    monkeypatch.setattr(candidates, "open_model", lambda name, options: tiny)
    monkeypatch.setattr(tiny, "_batch_size", 4)

    def run(folder: Path, *options: str) -> None:
        given = ["--model", TINY, "--max-new-tokens", "12", *options]
        main(["curate", "candidates", str(folder), *given])

    return run


# Prompts

HUMAN = "\n\nHuman: why?\n\nAssistant:"
HM = [*asked("hm"), {"role": "assistant", "content": "hm?"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "why?"}, asked("why?")),
        ({"question": "why?", "answer": "so"}, asked("why?")),
        ({"messages": asked("why?") + ANSWER}, asked("why?")),
        ({"prompt": "why?", "chosen": "a", "rejected": "b"}, asked("why?")),
        (
            {"prompt": "no", "chosen": asked("why?") + ANSWER, "rejected": asked("why?") + ANSWER},
            asked("why?"),
        ),
        ({"question": "why?", "chosen": "It is so.", "rejected": "It is not."}, asked("why?")),
        (
            {"conversations": asked("why?"), "chosen": ANSWER[0], "rejected": ANSWER[0]},
            asked("why?"),
        ),
        ({"chosen": f"{HUMAN} yes", "rejected": f"{HUMAN} no"}, asked("why?")),
        ({"prompt": HUMAN}, asked("why?")),
        ({"prompt": "Human: hm\n\nAssistant: hm?\n\nHuman: why?"}, [*HM, *asked("why?")]),
        ({"context": asked("why?"), "overall_preference": -2}, asked("why?")),
        ({"prompt": {"text": "why?", "role": "prompter", "replies": []}}, asked("why?")),
        ({"prompt": "why?", "system": "Be brief."}, [BRIEF, *asked("why?")]),
        ({"instruction": "Add.", "input": "2, 3"}, asked("Add.\n2, 3")),
    ],
    ids=[
        "text",
        "column",
        "messages",
        "pair",
        "conversations",
        "question of a pair",
        "ShareGPT",
        "transcripts",
        "transcript",
        "transcript that ends in a question",
        "winner",
        "tree",
        "system",
        "input",
    ],
)
def test_a_row_of_any_form_gives_its_prompt(row: Any, expected: Any) -> None:
    assert to_prompt(row) == expected


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "a\0b"}, "nul_character"),
        ({"prompt": "half \ud800"}, "lone_surrogate"),
        ({"answer": "so"}, "missing_column"),
        ({"chosen": "It is so.", "rejected": "It is not."}, "missing_column"),
        ({"prompt": "why?", "system_prompt": "Be brief."}, "ignored_column"),
        ({"prompt": 3}, "wrong_type"),
        ({"prompt": {"text": "why?", "deleted": True, "replies": []}}, "wrong_type"),
        ([], "wrong_type"),
    ],
)
def test_a_row_that_training_would_leave_out_gives_none(row: Any, name: str) -> None:
    with pytest.raises(Fault) as fault:
        to_prompt(row)
    assert fault.value.name == name


def test_prompts_of_several_files_are_added_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "why?"}, {"prompt": "WHY? "}, {"prompt": ""})
    second = tmp_path / "b.csv"
    second.write_text("instruction,output\nwhy?,x\nhow?,y\n")
    step = ["curate", "prompts", str(tmp_path / "out")]
    main([*step, first, "--licence", "MIT"])
    main([*step, str(second), "--source", "mine"])
    said = capsys.readouterr().out
    assert "left out 1 empty_prompt" in said
    assert "a.jsonl: 1 prompts added, 1 are there already or twice\n" in said
    assert "b.csv: 1 prompts added, 1 are there already or twice\n" in said
    assert [(one.messages, one.source, one.licence) for one in read_prompts(tmp_path / "out")] == [
        (asked("why?"), "a.jsonl", "MIT"),
        (asked("how?"), "mine", None),
    ]
    main([*step, first, str(second)])
    assert len(read_prompts(tmp_path / "out")) == 2


def test_prompts_of_the_same_texts_in_other_roles_are_two_prompts(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Add."}, *asked("1 and 2")]
    one_turn = asked("Add.\n1 and 2")
    file = write(tmp_path / "a.jsonl", {"prompt": system}, {"prompt": one_turn})
    main(["curate", "prompts", str(tmp_path / "out"), file])
    assert [one.messages for one in read_prompts(tmp_path / "out")] == [system, one_turn]


@pytest.mark.parametrize("files", [["none.jsonl"], []])
def test_what_is_refused_makes_no_folder(tmp_path: Path, files: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["curate", "prompts", str(tmp_path / "out"), *(str(tmp_path / f) for f in files)])
    assert not (tmp_path / "out").exists()


def test_a_draw_is_the_same_every_time_and_another_with_another_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"prompt": f"why {n // 2}?"} for n in range(100)))
    drawn = {}
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        out = tmp_path / name
        for _ in range(2):
            main(["curate", "prompts", str(out), file, "--num", "10", "--seed", seed])
        drawn[name] = [one.id for one in read_prompts(out)]
    assert len(set(drawn["one"])) == 10
    assert drawn["one"] == drawn["again"] != drawn["other"]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"prompt": "why?"}], ["--column", "ask"], "lacks column ask (it has prompt); name"),
        ([{"prompt": "why?"}], ["--num", "2"], "--num 2 is more than the 1 distinct prompts"),
        ([{"prompt": "why?"}], ["--num", "0"], "--num 0 must be at least 1"),
    ],
)
def test_prompts_that_cannot_be_taken_are_one_line(
    tmp_path: Path, rows: list[Any], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["curate", "prompts", str(tmp_path), write(tmp_path / "a.jsonl", *rows), *options])
    assert said in str(end.value)
    assert "\n" not in str(end.value)


# The folder


def test_a_line_that_was_cut_off_is_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / PROMPTS
    one, other = (Prompt(f"{n}", asked("x" * folder._BLOCK), "x", n) for n in range(2))
    append(path, [one])
    with path.open("ab") as file:
        file.write(b'{"id": "' + b"y" * 3 * folder._BLOCK)
    assert read_prompts(tmp_path) == [one]
    append(path, [other])
    assert read_prompts(tmp_path) == [one, other]


def test_a_line_that_is_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path / PROMPTS, {"id": "a"})
    with pytest.raises(UserError, match=r"prompts.jsonl, line 1, cannot be read: .*messages"):
        read_prompts(tmp_path)
    write(tmp_path / PROMPTS, {"id": "a", "messages": 5, "source": "x", "row": 1})
    with pytest.raises(UserError, match="line 1, cannot be read: messages is int, and must be"):
        read_prompts(tmp_path)


# Draws


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    num = 4000
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf])
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num

    def shares(temperature: float, top_p: float) -> list[float]:
        same = torch.ones(num, dtype=torch.float64)
        tokens = sample(logits.expand(num, -1), same * temperature, same * top_p, uniforms)
        return [float(share) for share in torch.bincount(tokens, minlength=5) / num]

    for temperature in (0.7, 1.3):
        powers = [np.exp(logit / temperature) for logit in logits.tolist()]
        expected = [power / sum(powers) for power in powers]
        assert shares(temperature, 1.0) == pytest.approx(expected, abs=1 / num)
    # At a temperature of 1 the likeliest token has 0.62, the two likeliest 0.85
    two = [np.exp(2) / (np.exp(2) + np.exp(1)), 0, 0, np.exp(1) / (np.exp(2) + np.exp(1)), 0]
    assert shares(1.0, 0.8) == pytest.approx(two, abs=1 / num)
    assert shares(1.0, 0.1) == [1, 0, 0, 0, 0]
    assert shares(0.0, 1.0) == [1, 0, 0, 0, 0]


def by_hand(model: Local, request: Request) -> str:
    """Answer alone, without padding and without a cache, a token at a time."""
    text = model._tokenizer.apply_chat_template(
        request.messages, add_generation_prompt=True, tokenize=False
    )
    ids = model._tokenizer(text, add_special_tokens=False)["input_ids"]
    uniforms = np.random.default_rng(request.seed).random(request.max_new_tokens, np.float32)
    written: list[int] = []
    for uniform in uniforms:
        with torch.no_grad():
            logits = model._network(input_ids=torch.tensor([ids + written])).logits[0, -1]
        shares = (logits.double() / request.temperature).softmax(-1).cumsum(-1)
        token = int((shares <= float(uniform)).sum())
        if token == model._tokenizer.eos_token_id:
            break
        written.append(token)
    return str(model._tokenizer.decode(written, skip_special_tokens=True)).strip()


def requests() -> list[Request]:
    return [
        Request(f"{n} {k}", asked(question), temperature, 1.0, 12, seed_of(0, question, k))
        for n, question in enumerate(QUESTIONS)
        for k, temperature in enumerate((0.7, 0.9))
    ]


def test_an_answer_is_that_of_its_seed_whatever_is_answered_beside_it(
    tiny: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [by_hand(tiny, request) for request in requests()]
    assert len(set(expected)) > 5
    for size in (16, 3):
        monkeypatch.setattr(tiny, "_batch_size", size)
        found = [made for batch in tiny.answer(requests(), ()) for _, made in batch]
        assert [one.text for one in found if isinstance(one, Answer)] == expected


def test_a_batch_of_which_an_answer_is_missing_is_answered_as_a_whole(
    tiny: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def count(prompts: Any, block: Sequence[Request]) -> Any:
        sizes.append(len(block))
        return dict.fromkeys(prompts, Answer("a", "stop", 1))

    monkeypatch.setattr(tiny, "_batch_size", 4)
    monkeypatch.setattr(tiny, "_generate", count)
    have = {request.id for request in requests()[:7]}
    found = [request for batch in tiny.answer(requests(), have) for request, _ in batch]
    assert found == requests()[7:]
    assert sizes == [4, 2]


def test_an_answer_that_is_cut_says_so(tiny: Local) -> None:
    short, long = (
        [
            made
            for batch in tiny.answer([replace(one, max_new_tokens=num) for one in requests()], ())
            for _, made in batch
            if isinstance(made, Answer)
        ]
        for num in (2, 60)
    )
    assert {(one.finish_reason, one.num_tokens) for one in short} >= {("length", 2)}
    assert all((one.num_tokens == 2) == (one.finish_reason == "length") for one in short)
    assert "stop" in {one.finish_reason for one in long}


def test_a_prompt_too_long_for_the_model_is_a_failure_of_its_own(tiny: Local) -> None:
    (batch,) = tiny.answer(
        [replace(requests()[0], messages=asked("why " * 300)), requests()[1]], ()
    )
    assert "more than the model's context of 256" in str(batch[0][1])
    assert isinstance(batch[1][1], Answer)


@pytest.mark.slow
def test_a_finished_run_answers_as_it_was_trained(
    tmp_path: Path, launch: Callable[..., Any], tiny: Local
) -> None:
    launch("train.max_steps=2", "optimizer.learning_rate=3e-2", "dataset.num_train=16",
           "dataset.num_eval=4", "dataset.num_generations=0", "tracker=none",
           f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    trained = Local(str(tmp_path / "run"), None, "fp32", 16)
    assert trained.found["weights"] != tiny.found["weights"]
    ours = [by_hand(trained, request) for request in requests()[:3]]
    found = [made for batch in trained.answer(requests()[:3], ()) for _, made in batch]
    assert [one.text for one in found if isinstance(one, Answer)] == ours


# The step


def test_every_prompt_is_answered_at_both_temperatures_and_compared(
    curation: Path, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(curation)
    found = read_candidates(curation)
    assert [(one.prompt_id, one.number) for one in found] == [
        (prompt.id, number) for prompt in read_prompts(curation) for number in (0, 1)
    ]
    assert [one.made_by["temperature"] for one in found] == [0.7, 0.9] * len(QUESTIONS)
    assert {"model", "seed", "top_p", "max_new_tokens", "weights", "torch"} <= found[
        0
    ].made_by.keys()
    expected = compare(found).comparisons
    assert Store(curation).comparisons() == expected
    assert 0 < len(expected) <= len(QUESTIONS)
    assert f"{len(expected)} comparisons" in capsys.readouterr().out
    answering(curation)
    assert read_candidates(curation) == found
    answering(curation, "--seed", "1")
    assert len(read_candidates(curation)) == 2 * len(found)


def test_after_a_kill_in_the_middle_of_a_line_the_answers_are_the_same(
    curation: Path, tmp_path: Path, answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / PROMPTS).write_bytes((curation / PROMPTS).read_bytes())
    answering(whole)

    def die_while_appending(path: Path, items: list[Candidate]) -> None:
        append(path, items)
        if path.read_bytes().count(b"\n") == 8:
            os.truncate(path, path.stat().st_size - 40)
            os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if not process:
        monkeypatch.setattr(candidates, "append", die_while_appending)
        answering(curation)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert len(read_candidates(curation)) == 7
    answering(curation)
    resumed, expected = (
        [replace(one, created="") for one in read_candidates(at)] for at in (curation, whole)
    )
    assert resumed == expected
    assert Store(curation).comparisons() == Store(whole).comparisons()


@pytest.mark.slow
def test_the_command_goes_on_after_kills_at_any_time(curation: Path) -> None:
    command = [sys.executable, "-m", "orpo_lab", "curate", "candidates", str(curation)]
    command += ["--model", TINY, "--max-new-tokens", "40", "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = curation / CANDIDATES
    for wanted in (1, 4):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while not (path.is_file() and path.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.005)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    found = read_candidates(curation)
    assert len({one.id for one in found}) == len(found) == 2 * len(QUESTIONS)


def test_answers_of_other_weights_under_the_same_name_are_refused(
    curation: Path, tiny: Local, answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(curation)
    monkeypatch.setitem(tiny.found, "weights", "others")
    with pytest.raises(SystemExit, match="its weights have changed"):
        answering(curation)
    answering(curation, "--seed", "1")


def test_two_steps_do_not_write_to_one_folder(
    curation: Path, answering: Callable[..., None]
) -> None:
    with folder.held(curation), pytest.raises(SystemExit, match="another process works on"):
        answering(curation)
    answering(curation)


def test_several_models_share_the_answers_to_a_prompt_out() -> None:
    assert spread(1) == [0.7]
    assert spread(2) == [0.7, 0.9]
    assert spread(3) == [0.7, 0.8, 0.9]
    parser = ArgumentParser()
    candidates.add_arguments(parser)
    options = parser.parse_args(["f", "--model", "a", "--model", "b", "--num", "4"])
    prompts = [Prompt("p", asked("why?"), "x", 0)]
    slots = {name: candidates.plan(prompts, {"model": name}, options) for name in ("a", "b")}
    assert [slot.number for slot in slots["a"]] == [0, 2]
    assert [slot.number for slot in slots["b"]] == [1, 3]
    given = sorted(slot.request.temperature for one in slots.values() for slot in one)
    assert given == spread(4)
    assert len({slot.request.seed for one in slots.values() for slot in one}) == 4


def test_only_answers_that_differ_and_say_something_are_compared() -> None:
    def answers(prompt: str, *texts: str) -> list[Candidate]:
        return [
            Candidate(f"{prompt}{n}", prompt, n, text, "length" if n == 2 else "stop", 1, "")
            for n, text in enumerate(texts)
        ]

    found = compare([*answers("p", "a", "a ", "b"), *answers("q", "", "c"), *answers("r", "d")])
    # The two that are the same text are asked about once
    (one,) = found.comparisons
    assert (one.prompt_id, one.first, one.second) == ("p", "p0", "p2")
    assert (found.num_identical, found.num_empty, found.num_cut) == (1, 1, 1)
    assert "left out: 1 repeated answers, 1 empty answers" in str(found)
    turned = compare([*answers("p", "a", "c", "b")][::-1])
    same = compare(answers("p", "a", "c", "b"))
    assert {one.id for one in turned.comparisons} == {one.id for one in same.comparisons}


def test_answers_that_are_added_leave_comparisons_as_they_are() -> None:
    texts = {"e": "a", "c": "b", "d": "a", "a": "b", "b": "c"}
    answers = [Candidate(name, "p", 0, text, "stop", 1, "") for name, text in texts.items()]
    (before,) = compare(answers[:2]).comparisons
    assert compare(answers[:4]).comparisons == [before]
    asked = [{one.first, one.second} for one in compare(answers).comparisons]
    assert asked == [{"c", "e"}, {"b", "e"}, {"b", "c"}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num", "0"], "--num 0 is less than the 1 models"),
        (["--model", TINY], "--model names a model twice"),
        (["--temperatures", "3"], "--temperatures must lie between 0 and 2"),
        (["--top-p", "0"], "--top-p 0 must be above 0 and at most 1"),
        (["--batch-size", "0"], "--batch-size 0 must be above 0"),
        (["--timeout", "inf"], "--timeout inf must be above 0, and a day at most"),
        (["--endpoint"], "--endpoint needs a URL, or OPENAI_BASE_URL"),
    ],
)
def test_options_out_of_range_are_one_line(
    curation: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit, match=said):
        main(["curate", "candidates", str(curation), "--model", TINY, *options])


def test_a_step_before_its_time_says_which_comes_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is missing; `python -m orpo_lab curate prompts` makes"):
        main(["curate", "candidates", str(tmp_path), "--model", TINY])
