"""Exports: what they hold, that they answer like their runs, and what is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orpo_lab.__main__ import main
from orpo_lab.config.model import EMBEDDED, local_path
from orpo_lab.errors import UserError
from orpo_lab.export import merge, write
from orpo_lab.export.card import without_places
from orpo_lab.export.check import TOLERANCES, Replies, compare
from orpo_lab.export.place import check_free
from orpo_lab.finished import FinishedRun
from orpo_lab.model.layers import dense_weight
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import EXIT_CODE
from tests.conftest import ROOT
from tests.hub_server import HubServer
from tests.test_run_folder import TWO_STEPS, start, write_pairs

# Steps so large that what training changed is far above rounding
RUN = (*TWO_STEPS, "train.max_steps=4", "train.warmup_steps=0", "optimizer.learning_rate=3e-3")
RUNS = {
    "qlora": (),
    "adamw": ("optimizer.learning_rate=1e-3", "model=local", "model.path=base", "model.dtype=fp32"),
}
TOOL_USE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
EXACT = TOLERANCES[torch.float32]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs, a base, and a finished run of every optimizer in RUNS.

    The base is the embedded model with a second chat template.
    """
    place = tmp_path_factory.mktemp("runs")
    write_pairs(place / "pairs.jsonl")
    shutil.copytree(local_path(EMBEDDED), place / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": TOOL_USE}
    tokenizer.save_pretrained(place / "base")
    with contextlib.chdir(place):
        for name, overrides in RUNS.items():
            start(*RUN, f"optimizer={name}", *overrides, f"hydra.run.dir={name}")
    return place


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the runs, as the working directory: its runs are not changed."""
    monkeypatch.chdir(runs)
    return runs


@pytest.fixture
def copied(here: Path, tmp_path: Path) -> Path:
    """A copy of the finished run of qlora, which a test may change."""
    return shutil.copytree("qlora", tmp_path / "run")


@pytest.fixture
def export(here: Path, tmp_path: Path) -> Callable[..., Path]:
    """Export a run to a folder of the test's own."""

    def make(run: str, *arguments: str) -> Path:
        target = tmp_path / "export"
        main(["export", run, "--to", str(target), *arguments])
        return target

    return make


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as refusal:
        main(["export", *arguments])
    said = capsys.readouterr()
    line = str(refusal.value) if refusal.value.code not in (1, 2) else said.err.strip()
    assert "\n" not in line
    return line


def texts(folder: Path) -> str:
    """Return all files of an export that are texts."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return "".join(file.read_text() for file in files if file.suffix != ".safetensors")


def merged_by_hand(run: Path) -> dict[str, Tensor]:
    """Return the weights of the adapted layers by their names: the base's numbers and s B A."""
    finished = FinishedRun(run)
    settings = json.loads((run / "final" / "adapter_config.json").read_text())
    factors = load_file(run / "final" / "adapter_model.safetensors")
    network = finished.load().get_base_model()
    found = {}
    for key in factors:
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            layer = network.get_submodule(name)
            change = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            base = dense_weight(layer.get_base_layer(), torch.float32)
            found[name] = base + settings["lora_alpha"] / settings["r"] * change
    return found


def test_a_merged_model_is_whole_and_nothing_in_it_tells_of_this_machine(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD", "2MB")
    folder = export("qlora", "--merge")
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert len(list(folder.glob("*.safetensors"))) > 1
    weights = dict(model.named_parameters())
    for name, weight in merged_by_hand(Path("qlora")).items():
        torch.testing.assert_close(weights[f"{name}.weight"].double(), weight, rtol=0, atol=1e-6)
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["dtype"] == "float32"
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in stored, "the head is the embeddings"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained("qlora/final").chat_template
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert f'AutoModelForCausalLM.from_pretrained("{folder.name}")' in texts(folder)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "read by a server, too"
    said = texts(folder)
    assert str(Path.cwd()) not in said
    assert str(local_path(EMBEDDED)) not in said
    assert {file.name for file in folder.parent.iterdir()} == {"export"}


def test_the_card_has_a_header_for_the_hub_figures_with_intervals_and_the_command(
    export: Callable[..., Path],
) -> None:
    folder = export("adamw")
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orpo", "orpo_lab"],
    }
    assert "pairs.jsonl (not known here)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| chosen_nll")]
    assert row.count("[") == 2
    held_out = RunFolder(Path("adamw")).read_json("data_report.json")["held_out"]["num_kept"]
    assert f"| chosen_nll | {held_out} |" in text
    assert "| repetition | 2 |" in text, "of the answers that were generated"
    assert "```bash\npython launch.py " in text
    assert " dataset.train_path=pairs.jsonl " in text
    assert "hydra.run.dir" not in text
    record = json.loads((folder / "export.json").read_text())
    assert record["run"] == "adamw"
    assert record["differences"]["run"]["largest"] < EXACT.logp
    assert record["differences"]["run"]["num_equal"] == 2
    templates: Any = AutoTokenizer.from_pretrained(folder).chat_template
    assert templates == AutoTokenizer.from_pretrained("base").chat_template
    assert templates["tool_use"] == TOOL_USE


def test_a_chat_template_that_names_this_machine_is_refused(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, name = write._check_replies, "additional_chat_templates/tool_use.jinja"

    def named(part: Path, *given: Any, **others: Any) -> Any:
        found = own(part, *given, **others)
        (part / name).write_text(f"{TOOL_USE}{{# {here} #}}")
        return found

    monkeypatch.setattr(write, "_check_replies", named)
    line = refused(capsys, "adamw", "--to", str(tmp_path / "export"))
    assert line == f"error: {name} of the export would name {here}; take it out of {name}"


def test_an_adapter_names_its_base_on_the_hub_and_is_the_runs_own(
    export: Callable[..., Path],
) -> None:
    folder = export("qlora", "--base", "org/name@v1")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "v1")
    own, given = (place / "adapter_model.safetensors" for place in (Path("qlora/final"), folder))
    assert own.read_bytes() == given.read_bytes()
    card = (folder / "README.md").read_text()
    assert "base_model: org/name\nbase_model_relation: adapter\n" in card
    assert "load_in_4bit=True" in card
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [AutoTokenizer.from_pretrained(folder).eos_token_id]
    assert f'GenerationConfig.from_pretrained("{folder.name}")' in card


def test_the_16bit_base_is_farther_from_the_run_than_the_dequantized_one(
    export: Callable[..., Path],
) -> None:
    folder = export("qlora", "--merge", "--into", "16bit")
    found = json.loads((folder / "export.json").read_text())["differences"]
    assert found["unmerged"]["largest"] < EXACT.logp
    assert found["run"]["largest"] > 10 * EXACT.logp


@pytest.mark.parametrize("arguments", [["--merge"], ["--base", "org/name"]], ids=["merged", "not"])
def test_a_scaled_adapter_is_refused_and_leaves_nothing(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    own, write_adapter = merge.change, write._write_adapter

    def scaled(network: Any, finished: Any, order: Any, part: Path) -> Any:
        order = write_adapter(network, finished, order, part)
        settings = json.loads((part / "adapter_config.json").read_text())
        settings["lora_alpha"] *= 1.1
        (part / "adapter_config.json").write_text(json.dumps(settings))
        return order

    monkeypatch.setattr(merge, "change", lambda layer: 1.1 * own(layer))
    monkeypatch.setattr(write, "_write_adapter", scaled)
    target = tmp_path / "export"
    line = refused(capsys, "qlora", "--to", str(target), *arguments)
    assert line.startswith("error: the export does not answer like qlora, and is not kept")
    assert "(tolerance 0.001)" in line
    assert not list(tmp_path.iterdir())


def test_a_run_whose_result_has_changed_since_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "final" / "adapter_model.safetensors"
    save_file({name: 1.1 * weight for name, weight in load_file(file).items()}, file)
    line = refused(capsys, str(copied), "--merge")
    assert "is not the one that the run has measured" in line
    assert not (copied / "export").exists()


@pytest.mark.parametrize("content", [b"PAR1", None], ids=["cut", "gone"])
def test_a_run_whose_scores_cannot_be_read_is_refused_by_their_name(
    copied: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    (copied / "scores.parquet").unlink()
    if content:
        (copied / "scores.parquet").write_bytes(content)
    line = refused(capsys, str(copied), "--merge")
    assert f"{copied}/scores.parquet cannot be read" in line


def test_an_adapter_that_is_cut_off_is_refused_by_its_name(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "final" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read" in refused(capsys, str(copied), "--merge")


def test_an_export_to_a_link_goes_where_the_link_points(here: Path, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    main(["export", "adamw", "--to", str(link)])
    assert link.is_symlink()
    assert (disk / "model.safetensors").is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"disk", "link"}


def test_of_a_run_that_has_not_finished_the_message_says_how_to_come_to_an_export(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(copied).set_status("stopped", "SIGTERM", exit_code=75)
    line = refused(capsys, str(copied), "--merge")
    assert line == (
        f"error: {copied} holds no result: its run is stopped; end it by the command that began it "
        f"(choices.yaml) with resume={copied}, then repeat this one"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qlora"], "write a whole model with --merge, or give the base's name on the hub"),
        (["qlora", "--to", "."], ". is not empty; choose a new folder with --to"),
        (["qlora", "--merge", "--to", "qlora/final/x"], "qlora/final/x is in final/ of a run"),
        (["qlora", "--to", "adamw/checkpoints/x/y"], "is in checkpoints/ of a run"),
        (["qlora", "--into", "16bit"], "give --merge too"),
        (["adamw", "--into", "16bit", "--merge"], "is not quantized"),
        (["qlora", "--base", "org/name", "--dtype", "bf16"], "as it was trained"),
        (["qlora", "--base", "/models/smol"], "--base /models/smol must be a name on the hub"),
        (["qlora", "--base", "no name!!"], "--base no name!! must be a name on the hub"),
        (["qlora", "--private"], "--private is for --push"),
        (["qlora", "--merge", "--push", "org/name"], "HF_HUB_OFFLINE is set"),
        (["nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refused(capsys, *arguments)


def test_a_folder_of_that_name_that_is_no_runs_may_be_exported_to(tmp_path: Path) -> None:
    check_free(tmp_path / "final" / "checkpoints" / "export")


def test_the_working_directory_is_not_replaced(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the folder that you are in" in refused(capsys, str(here / "adamw"), "--to", ".")


def test_of_two_exports_to_one_place_the_second_is_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "export"
    with write._part(target) as part:
        line = refused(capsys, "adamw", "--to", str(target))
        assert line.endswith(f"another export to {target} is at work; choose a new --to")
        assert part.is_dir()
    assert not list(tmp_path.iterdir())
    target.mkdir()
    (target / "README.md").touch()
    with pytest.raises(UserError, match="is not empty"), write._part(target):
        pass


def test_a_signal_in_the_middle_leaves_nothing(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = write._write_adapter

    def stopped(network: Any, finished: FinishedRun, order: write.Order, part: Path) -> None:
        saved(network, finished, order, part)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(write, "_write_adapter", stopped)
    with pytest.raises(SystemExit) as end:
        main(["export", "qlora", "--base", "org/name", "--to", str(tmp_path / "export")])
    assert end.value.code == EXIT_CODE
    assert capsys.readouterr().err.endswith("stopped by SIGTERM\n")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = refused(capsys, "qlora", "--merge", "--to", str(tmp_path / "export"))
    assert "has 0.0 GB of room and the export takes 0.1 GB" in line


def test_bf16_keeps_changes_that_are_smaller_than_half_of_its_step() -> None:
    base = torch.full((400, 400), 0.5, dtype=torch.bfloat16)
    model: Any = nn.Linear(400, 400, bias=False)
    model.device = torch.device("cpu")
    # A step of bf16 at 0.5 is 2**-8
    model.weight.data = base.float() + 2**-11
    plain: Any = merge.plain(model, torch.bfloat16)
    kept = (plain.weight.double() - base.double()).mean()
    assert kept.item() == pytest.approx(2**-11, rel=0.05)


def test_what_training_changed_is_kept_or_not() -> None:
    before = torch.zeros(40, 2)
    after = Replies(torch.linspace(-1, 1, 80).view(40, 2), [[1, 2], [3]])
    half = compare(Replies(after.logps / 2, [[1, 2], [4]]), after, before, gap=0.4)
    assert (half.largest, half.num_equal) == (0.5, 1)
    assert half.kept == pytest.approx(0.5)
    assert len(half.faults(TOLERANCES[torch.bfloat16])) == 3
    assert not compare(after, after, before).faults(EXACT)
    nan = Replies(after.logps * torch.nan, after.answers)
    assert compare(nan, after, before).faults(TOLERANCES[torch.bfloat16])


def test_paths_of_this_machine_become_names() -> None:
    overrides = [
        "model.path=/home/me/models/smol",
        "dataset.train_path=[~/data/a.jsonl,../b.jsonl]",
        "dataset.path=org/pairs",
        "+x=hf://datasets/org/name/file",
        "hydra.run.dir=/home/me/run",
        "++hydra.searchpath=[file:///home/me/recipes]",
        "dataset.eval_path='/home/me/My Projects/acme/eval.jsonl'",
        "dataset.sources.math.train_path=~me/math.jsonl",
        "start_from=file:///home/me/sft",
        "tracker=mlflow",
        "tracker.mlflow.uri=sqlite:////home/me/m.db",
        "judge.url=http://10.1.2.3:8000/v1",
        "name=mine",
        "method.default_beta=0.3",
        "beta=0.2",
    ]
    assert without_places(overrides) == [
        "model.path=smol",
        "dataset.train_path=[a.jsonl,b.jsonl]",
        "dataset.path=org/pairs",
        "+x=hf://datasets/org/name/file",
        "dataset.eval_path='eval.jsonl'",
        "dataset.sources.math.train_path=math.jsonl",
        "start_from=sft",
        "method.default_beta=0.3",
        "beta=0.2",
    ]


PUSH = """
import sys
from pathlib import Path
from orpo_lab.errors import UserError
from orpo_lab.export import hub
try:
    hub.check("org/name")
    print(hub.push(Path("export"), "org/name", private=True))
except UserError as error:
    sys.exit(str(error))
"""


def test_an_export_is_pushed_once_and_the_token_is_nowhere(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 10
    server = HubServer(token)
    (tmp_path / "export").mkdir()
    (tmp_path / "beside.txt").write_text("not of the export")
    for name in ("README.md", "model.safetensors"):
        (tmp_path / "export" / name).write_text(f"the content of {name}")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT)}
    env = {**os.environ, **home, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    del env["HF_HUB_OFFLINE"]

    def push(**changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PUSH]
        given = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env | changes}
        done: subprocess.CompletedProcess[str] = subprocess.run(command, **given)  # type: ignore[call-overload]
        assert token not in done.stdout + done.stderr
        return done

    done = push()
    assert done.stdout.strip() == f"{server.url}/org/name", done.stderr
    files = server.repositories["org/name"]
    assert {*files} == {".gitattributes", "README.md", "model.safetensors"}
    assert files["model.safetensors"] == b"the content of model.safetensors"
    assert server.private["org/name"]
    assert "holds files already (README.md)" in push().stderr
    assert "did not take it" in push(HF_TOKEN="hf_" + "wrong" * 6).stderr
    nobody = push(HF_ENDPOINT="http://127.0.0.1:9").stderr
    assert nobody.startswith("--push org/name: the hub did not take it ([Errno "), nobody
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert token.encode() not in written


@pytest.mark.slow
def test_an_adapter_is_loaded_by_peft_alone(here: Path, tmp_path: Path) -> None:
    main(["export", "qlora", "--base", "org/name", "--to", str(tmp_path / "export")])
    settings = tmp_path / "export" / "adapter_config.json"
    base = {"base_model_name_or_path": str(local_path(EMBEDDED)), "revision": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | base))
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_gets_a_signal_leaves_nothing(
    here: Path, tmp_path: Path, number: signal.Signals
) -> None:
    target = tmp_path / "export"
    command = [sys.executable, "-m", "orpo_lab", "export", "adamw", "--to", str(target)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".orpo_lab.export.part/*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == EXIT_CODE
    assert said.endswith(f"stopped by {number.name}\n")
    assert not list(tmp_path.iterdir())
