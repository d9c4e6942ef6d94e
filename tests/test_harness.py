"""Runs judged by lm-evaluation-harness: real tasks of one's own, on the real tiny model."""

import json
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lab import config, evaluation
from orpo_lab.__main__ import main
from orpo_lab.config.evaluation import Harness
from orpo_lab.config.identity import identity
from orpo_lab.data import embedded
from orpo_lab.errors import UserError
from orpo_lab.evaluation.harness import Tasks, judge_all
from orpo_lab.evaluation.reached import FILES, Reached, kept
from orpo_lab.model.causal import without_adapters
from orpo_lab.records.card import WHEN
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stopped
from tests.endpoint_server import Endpoint, say
from tests.test_run_folder import start

Load = Callable[..., config.Config]
Build = Callable[..., Any]
Launch = Callable[..., subprocess.CompletedProcess[str]]
NUM = 12
SHORT = (
    "train.max_steps=2",
    "dataset.num_train=32",
    "dataset.num_eval=4",
    "dataset.num_generations=0",
    "tracker=none",
)
NAMES = ("lab_choice", "lab_answer")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1.0
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ANSWER = """
doc_to_target: answer
generation_kwargs:
  until: ["<|user|>"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
# Of a task that fails once the model is trained
FAILING = """
doc_to_target: answer
generation_kwargs:
  max_gen_toks: 2
process_results: !function mine.fails
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, kind: str, rest: str) -> None:
    data = folder / "documents.jsonl"
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks over held-out pairs: to choose an answer, and to write one."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "question": row["prompt"][0]["content"],
            "choices": [row["chosen"][0]["content"], row["rejected"][0]["content"]],
            "answer": row["answer"],
        }
        for row in embedded.pairs("eval", num=2 * NUM, seed=3)
        if row["wording"] == "terse"
    ]
    lines = [json.dumps(document) + "\n" for document in documents]
    (folder / "documents.jsonl").write_text("".join(lines))
    write_task(folder, "lab_choice", "multiple_choice", CHOICE)
    write_task(folder, "lab_answer", "generate_until", ANSWER)
    return folder


def judged_by(folder: Path, *names: str) -> tuple[str, ...]:
    return (
        "evaluation=harness",
        f"evaluation.tasks=[{','.join(names or NAMES)}]",
        f"evaluation.task_path={folder}",
        "evaluation.trust_task_code=true",
    )


def asked(folder: Path, *names: str, **others: Any) -> Harness:
    keys = {
        "num_fewshot": None,
        "num_documents": None,
        "apply_chat_template": True,
        "batch_size": 4,
        "before": True,
    }
    return Harness(
        tasks=[*(names or NAMES)],
        task_path=str(folder),
        trust_task_code=True,
        **(keys | others),
    )


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that trained all weights and was judged."""
    place = tmp_path_factory.mktemp("judged") / "run"
    start(*SHORT, *judged_by(folder), "optimizer=adamw", f"hydra.run.dir={place}")
    return RunFolder(place)


def harness_of(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name.startswith("harness/")}


def test_a_run_has_the_figures_before_and_after_in_summary_metrics_and_table(
    run: RunFolder,
) -> None:
    summary, lines = run.read_json("summary.json"), run.metrics()
    before, after = harness_of(summary["before"]), harness_of(summary["after"])
    assert before.keys() == after.keys()
    assert after["harness/lab_choice/num_documents"] == NUM
    assert 0 < after["harness/lab_choice/acc"] < 1
    share = after["harness/lab_choice/acc"]
    error = (share * (1 - share) / (NUM - 1)) ** 0.5
    assert after["harness/lab_choice/acc_stderr"] == pytest.approx(error)
    assert after["harness/lab_answer/exact_match"] > 0
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert harness_of(lines[0]) == before
    assert harness_of(lines[-1]) == after
    said = run.file("run.log").read_text()
    old, new = (f"{figures['harness/lab_choice/acc']:.3f}" for figures in (before, after))
    assert re.search(rf"\| harness/lab_choice/acc +\| +{old} \| +{new} \| ± 0\..*, 12 doc", said)
    assert "harness, after training, task 2 of 2" in said
    assert "harness/lab_choice/acc" in run.file("final/README.md").read_text()


def test_the_figures_are_those_of_the_harness_itself_on_the_saved_model(
    run: RunFolder, folder: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run.file("final")), "dtype": "float32"},
        tasks=[*NAMES],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=8,
        apply_chat_template=True,
    )
    after = kept(run, "after")
    choice, answer = after["lab_choice"], after["lab_answer"]
    theirs = found["results"]
    for metric in ("acc", "acc_stderr"):
        ours = choice.figures[f"harness/lab_choice/{metric}"]
        assert ours == theirs["lab_choice"][f"{metric},none"]
    name = "harness/lab_answer/exact_match"
    assert answer.figures[name] == theirs["lab_answer"]["exact_match,none"]
    assert choice.better == {"harness/lab_choice/acc": "higher"}
    for row, sample in zip(choice.documents, found["samples"]["lab_choice"], strict=True):
        assert row["scores"] == {"acc": sample["acc"]}
        assert row["prompt"] == sample["arguments"][0][0]
        np.testing.assert_allclose(
            [logp for logp, _ in row["answers"]],
            [logp for logp, _ in sample["filtered_resps"]],
            atol=1e-5,
        )
    written = [sample["filtered_resps"] for sample in found["samples"]["lab_answer"]]
    assert [row["answers"] for row in answer.documents] == written


def test_a_documents_log_likelihood_is_that_of_plain_torch(run: RunFolder, folder: Path) -> None:
    final = run.file("final")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(final)
    row = kept(run, "after")["lab_choice"].documents[0]
    texts = json.loads((folder / "documents.jsonl").read_text().splitlines()[0])["choices"]
    for text, (logp, _) in zip(texts, row["answers"], strict=True):
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        whole = tokenizer(row["prompt"] + text, add_special_tokens=False).input_ids
        ids = torch.tensor([whole])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
        assert logp == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["qlora", *(pytest.param(o, marks=pytest.mark.slow) for o in ("lora", "galore"))]
)
def test_a_judged_run_trains_bit_for_bit_as_one_that_is_not_and_keeps_its_figures_when_it_goes_on(
    optimizer: str, folder: Path, tmp_path: Path
) -> None:
    def run(name: str, *overrides: str) -> RunFolder:
        start(*SHORT, f"optimizer={optimizer}", f"hydra.run.dir={tmp_path / name}", *overrides)
        return RunFolder(tmp_path / name)

    plain, judged = run("plain"), RunFolder(tmp_path / "judged")
    with pytest.raises(Stopped):
        run("judged", *judged_by(folder), "train.max_hours=1e-9")
    before = judged.file(FILES["before"]).read_text()
    assert not judged.file(FILES["after"]).exists()
    run("judged", *judged_by(folder), "resume=auto")
    assert judged.file(FILES["before"]).read_text() == before
    assert [line["step"] for line in judged.metrics() if harness_of(line)] == [0, 2]
    assert [line for line in judged.metrics() if not harness_of(line)] == plain.metrics()
    (weights,) = (file.name for file in plain.file("final").glob("*.safetensors"))
    ours, theirs = (one.file(f"final/{weights}").read_bytes() for one in (judged, plain))
    assert ours == theirs


def test_the_model_and_all_random_states_are_left_as_they_were(
    load: Load, build_model: Build, tokenizer: Any, folder: Path
) -> None:
    network = build_model(load("optimizer=qlora"))
    network.train()
    without_adapters(network).get_output_embeddings().eval()
    for weight in network.parameters():
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)

    def everything() -> tuple[Any, ...]:
        return (
            [module.training for module in network.modules()],
            [weight.requires_grad for weight in network.parameters()],
            [None if w.grad is None else w.grad.sum().item() for w in network.parameters()],
            [weight.detach().double().sum().item() for weight in network.parameters()],
            (
                torch.get_rng_state().tolist(),
                random.getstate(),
                pickle.dumps(np.random.get_state()),
            ),
            (tokenizer.padding_side, tokenizer.pad_token),
            network.config.to_dict(),
            without_adapters(network).generation_config.to_dict(),
        )

    tasks = Tasks(asked(folder))
    before = everything()
    assert set(before[0]) == {True, False}, "only a mixture of modes shows that each is put back"
    judge_all(tasks, network, tokenizer, load(), dtype=torch.float32, which="this", when="before")
    assert everything() == before


def test_what_was_kept_of_the_same_model_and_documents_is_not_computed_again(
    load: Load, build_model: Build, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    network = build_model(load("optimizer=lora"))

    def reached(tasks: Tasks, which: str, **kept: Reached) -> Reached:
        (one,) = judge_all(
            tasks,
            network,
            tokenizer,
            load(),
            dtype=torch.float32,
            which=which,
            when="before",
            kept=kept,
        ).values()
        return one

    tasks = Tasks(asked(folder, "lab_choice"))
    first = reached(tasks, "this")
    again = Tasks(asked(folder, "lab_choice", batch_size=1, before=False))
    assert reached(again, "this", lab_choice=first) is first
    of_earlier_version = replace(first, asked=None)
    assert reached(again, "this", lab_choice=of_earlier_version) == first
    another = reached(tasks, "another", lab_choice=first)
    assert another is not first
    assert another.asked == first.asked
    for other in ({"num_documents": 3}, {"num_fewshot": 1}, {"apply_chat_template": False}):
        asked_otherwise = Tasks(asked(folder, "lab_choice", **other))
        found = reached(asked_otherwise, "this", lab_choice=first)
        assert found.key != first.key
        assert found.asked != first.asked
    changed = shutil.copytree(folder, tmp_path / "changed")
    lines = (changed / "documents.jsonl").read_text().splitlines(keepends=True)
    (changed / "documents.jsonl").write_text("".join(lines[1:]))
    write_task(changed, "lab_choice", "multiple_choice", CHOICE)
    assert Tasks(asked(changed, "lab_choice")).key("lab_choice", "this") != first.key


def test_a_run_may_go_on_with_other_tasks(load: Load, folder: Path) -> None:
    judged = load(*judged_by(folder))
    assert identity(judged) == identity(load())
    assert identity(judged) == identity(load(*judged_by(folder, "lab_choice")))


@pytest.mark.parametrize(
    ("name", "kind", "rest", "said"),
    [
        pytest.param(
            *("lab_chioce", "", "", "the harness has no task lab_chioce; did you mean lab_choice?"),
            marks=pytest.mark.slow,
        ),
        ("lab_gone", "multiple_choice", CHOICE, "lab_gone cannot be loaded (FileNotFoundError"),
        ("lab_unsafe", "generate_until", f"unsafe_code: true{ANSWER}", "runs code that the model"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line_before_the_data_are_read(
    folder: Path, tmp_path: Path, name: str, kind: str, rest: str, said: str
) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    if kind:
        write_task(mine, name, kind, rest)
    if name == "lab_gone":
        (mine / "documents.jsonl").unlink()
    with pytest.raises(UserError) as refused:
        start(*SHORT, *judged_by(mine, name), f"hydra.run.dir={tmp_path / 'run'}")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    place = RunFolder(tmp_path / "run")
    assert place.is_untrained()
    assert not place.file("data_report.json").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation.tasks=[]"], "evaluation.tasks is empty"),
        (["evaluation.tasks=[a,b,a]"], "evaluation.tasks names a twice"),
        (["evaluation.num_documents=0"], "evaluation.num_documents=0 must be at least 1"),
        (["evaluation.task_path=x"], "say evaluation.trust_task_code=true"),
    ],
)
def test_wrong_keys_are_refused(load: Load, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("evaluation=harness", *overrides)


def test_a_failure_after_training_does_not_lose_the_run(folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    write_task(mine, "lab_fails", "generate_until", FAILING)
    (mine / "mine.py").write_text("def fails(doc, results):\n    raise RuntimeError('no judge')\n")
    run = (*SHORT, *judged_by(mine, "lab_fails"), "optimizer=lora")
    place = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="lab_fails failed before training"):
        start(*run, f"hydra.run.dir={place.path}")
    start(*run, "evaluation.before=false", f"hydra.run.dir={place.path}")
    status = place.status()
    assert status["state"] == "finished"
    assert "no judge" in status["missing"][FILES["after"]]
    assert place.file("final/adapter_model.safetensors").is_file()


def test_the_command_judges_a_finished_run_as_the_run_itself_does(
    run: RunFolder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    expected = {when: kept(run, when) for when in FILES}
    shutil.rmtree(copy.file("harness"))
    for name in NAMES:
        options = ["--task-path", str(folder), "--trust-task-code", "--before"]
        main(["evaluate", str(copy.path), "--tasks", name, *options])
    for when, reached in expected.items():
        found = kept(copy, when)
        assert {name: one.figures for name, one in found.items()} == {
            name: one.figures for name, one in reached.items()
        }
        assert found["lab_answer"].documents == reached["lab_answer"].documents
    assert "after training" in capsys.readouterr().out
    assert copy.read_json("summary.json") == run.read_json("summary.json")


def test_the_command_leaves_no_figures_before_training_that_were_asked_in_another_way(
    run: RunFolder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    task = ["--tasks", "lab_choice", "--task-path", str(folder), "--trust-task-code"]
    main(["evaluate", str(copy.path), *task])
    assert kept(copy, "before") == kept(run, "before")
    assert "removed" not in capsys.readouterr().out
    main(["evaluate", str(copy.path), *task, "--plain", "--num-documents", "5"])
    assert kept(copy, "before").keys() == {"lab_answer"}
    summary = copy.read_json("summary.json")
    assert summary["after"]["harness/lab_choice/num_documents"] == 5
    left = harness_of(summary["before"])
    assert left
    assert all(name.startswith("harness/lab_answer/") for name in left)
    assert "lab_choice: removed the figures of the untrained model" in capsys.readouterr().out


def test_nothing_is_judged_by_default(load: Load) -> None:
    assert evaluation.load(load().evaluation) is None


# IFEval as the harness has it, on documents of the hub's schema: what the hub would send
IFEVAL = """
include: {definition}
task: lab_ifeval
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}}}}}
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: 8}}
"""
INSTRUCTIONS: list[list[tuple[str, dict[str, Any]]]] = [
    # No answer of eight tokens has as many words; each has fewer; the words are no tokens of it
    [("length_constraints:number_words", {"relation": "at least", "num_words": 400})],
    [("length_constraints:number_words", {"relation": "less than", "num_words": 400})],
    [
        ("keywords:forbidden_words", {"forbidden_words": ["zyzzyva"]}),
        ("keywords:existence", {"keywords": ["zyzzyva"]}),
    ],
]


@pytest.mark.slow
def test_ifeval_checks_the_answers_to_its_documents(tmp_path: Path) -> None:
    import lm_eval

    documents = [
        {
            "key": number,
            "prompt": "2 plus 2?",
            "instruction_id_list": [name for name, _ in each],
            "kwargs": [given for _, given in each],
        }
        for number, each in enumerate(INSTRUCTIONS)
    ]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    definition = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    task = IFEVAL.format(definition=definition, data=data)
    (tmp_path / "lab_ifeval.yaml").write_text(task)
    place = tmp_path / "run"
    start(*SHORT, *judged_by(tmp_path, "lab_ifeval"), f"hydra.run.dir={place}")
    summary = RunFolder(place).read_json("summary.json")
    for when in WHEN:
        found = harness_of(summary[when])
        for how in ("strict", "loose"):
            assert found[f"harness/lab_ifeval/prompt_level_{how}_acc"] == pytest.approx(1 / 3)
            assert found[f"harness/lab_ifeval/inst_level_{how}_acc"] == pytest.approx(2 / 4)


@pytest.mark.slow
def test_jobs_of_a_sweep_judge_the_untrained_model_once_and_a_report_has_each_ones_figures(
    folder: Path, server: Endpoint, launch: Launch, tmp_path: Path
) -> None:
    server.usual = say(lambda body: "A" if "1" in body["messages"][0]["content"] else "B")
    answers = ("dataset.num_generations=4", "dataset.max_new_tokens=4")
    judge = ("judge=endpoint", f"judge.url={server.url}", "judge.model=m")
    given = (*SHORT, *judged_by(folder), *answers, *judge, "optimizer.learning_rate=1e-2")
    said = launch("-m", "beta=0.1,0.2", *given, "hydra.sweep.dir=sweep").stdout
    assert [said.count(f"harness, {when} training") for when in ("before", "after")] == [2, 4]
    runs = [tmp_path / "sweep" / f"{number}-beta={beta}" for number, beta in ((0, 0.1), (1, 0.2))]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for name in ("harness/lab_choice/acc", "harness/lab_answer/exact_match"):
        assert all({name} <= summary[when].keys() for summary in summaries for when in WHEN)
        assert len({summary["before"][name] for summary in summaries}) == 1
    assert all(summary["judge/num_prompts"] == 4 for summary in summaries)
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert report.count("| lab_choice/acc |") == 2
    assert "judge/win_rate" in report
