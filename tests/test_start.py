"""Runs that start from another run's result: two stages of training, and more."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from orpo_lab import config, run
from orpo_lab.config.identity import identity, road
from orpo_lab.errors import UserError
from orpo_lab.evaluate import Evaluation, Scores
from orpo_lab.model.layers import fused, fusible
from orpo_lab.model.precision import DTYPES
from orpo_lab.model.start import Origin, origin_of
from orpo_lab.records import results
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stopped
from orpo_lab.sweep.folder import CACHE, Sweep
from orpo_lab.training.files import Files
from tests.conftest import compose_config
from tests.test_checkpoint import SMALL, assert_same, signal_after
from tests.test_run_folder import TWO_STEPS, start, write_pairs

Launch = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., config.Config]

IDS = torch.arange(3, 60)[None]
# How far two ways to compute the same in fp32 may be apart, in nats
ROUNDING = 1e-4


def logps(network: Any) -> Tensor:
    """Return the log-probabilities of every next token, [T, V], as the engine computes them."""
    network.eval()
    with torch.no_grad(), fused(fusible(network), torch.float32):
        return torch.log_softmax(network(input_ids=IDS).logits[0].float(), -1)


def leave(network: Any, origin: Origin, tokenizer: Any, folder: Path) -> None:
    """Leave a run folder, as if the run had finished with this network."""
    place = RunFolder(folder)
    place.begin(origin.config, {}, place.check(origin.config, [], resume=None))
    files = Files(place.file("final"))
    results.save_model(network, tokenizer, files, dtype=None)
    origin.save_base(network, files, place.file("final"))
    place.set_status("finished", exit_code=0)


def begin(tokenizer: Any, *overrides: str) -> tuple[Any, Origin]:
    """Return the network that a run begins with, and what it starts from."""
    origin = origin_of(config.load(compose_config(*overrides)))
    network, _ = origin.load(tokenizer, DTYPES[origin.config.model.dtype])
    return network, origin


def trained(tokenizer: Any, *overrides: str) -> tuple[Any, Origin]:
    """Return a network whose trained weights have moved, as far as training moves them."""
    torch.manual_seed(0)  # of new adapters
    network, origin = begin(tokenizer, *overrides)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return network, origin


EARLIER = {
    "lora": ("optimizer=lora",),
    "qlora": (),
    "int8": ("quantization=int8",),
    "adamw": ("optimizer=adamw",),
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Tensor]:
    """Finished runs by the folder of each, and the log-probabilities that each ended with."""
    folder, ended = tmp_path_factory.mktemp("earlier"), {}
    for name, overrides in EARLIER.items():
        network, origin = trained(tokenizer, *overrides)
        leave(network, origin, tokenizer, folder / name)
        ended[str(folder / name)] = logps(network)
    return ended


def named(earlier: dict[str, Tensor], name: str) -> tuple[str, Tensor]:
    return next((folder, ended) for folder, ended in earlier.items() if Path(folder).name == name)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("lora", "optimizer=lora optimizer.dropout=0.3", "the adapter of lora goes on as an"),
        ("lora", "optimizer=lora optimizer.r=4", "the adapter of lora is merged into its base"),
        ("lora", "optimizer=lora optimizer.alpha=4", "the adapter of lora is merged into its base"),
        ("lora", "optimizer=adamw", "the adapter of lora is merged into its base"),
        ("lora", "optimizer=galore", "the adapter of lora is merged into its base"),
        ("qlora", "optimizer=qlora", "the adapter of qlora goes on as an adapter"),
        ("qlora", "optimizer=lora", "base, which is dequantized first"),
        ("qlora", "optimizer=galore", "base, which is dequantized first"),
        ("int8", "quantization=int8", "the adapter of int8 goes on as an adapter"),
        ("int8", "optimizer=adamw", "base, which is dequantized first"),
        ("adamw", "optimizer=adamw", "the weights of adamw are the base"),
        ("adamw", "optimizer=lora", "the weights of adamw are the base"),
        ("adamw", "optimizer=galore", "the weights of adamw are the base"),
    ],
)
def test_a_run_starts_where_the_earlier_one_ended(
    earlier: dict[str, Tensor], tokenizer: Any, name: str, overrides: str, words: str
) -> None:
    folder, ended = named(earlier, name)
    network, origin = begin(tokenizer, f"start_from={folder}", *overrides.split())
    assert words in origin.words
    assert (logps(network) - ended).abs().max() < ROUNDING
    untrained, _ = begin(tokenizer, *overrides.split())
    assert (logps(untrained) - ended).abs().max() > 100 * ROUNDING
    is_trained = [weight.requires_grad for weight in network.parameters()]
    assert is_trained == [weight.requires_grad for weight in untrained.parameters()]
    assert {p.dtype for p in network.parameters()} == {p.dtype for p in untrained.parameters()}


@pytest.mark.parametrize("optimizer", ["galore", "adamw"])
def test_a_merged_base_is_stored_in_the_precision_that_its_training_needs(
    earlier: dict[str, Tensor], tokenizer: Any, optimizer: str
) -> None:
    overrides = (f"optimizer={optimizer}", "model.dtype=bf16")
    for name in ("lora", "qlora"):
        network, _ = begin(tokenizer, f"start_from={named(earlier, name)[0]}", *overrides)
        untrained, _ = begin(tokenizer, *overrides)
        assert {p.dtype for p in network.parameters()} == {p.dtype for p in untrained.parameters()}
        assert not network.get_input_embeddings()._forward_hooks, "the adapter's hook has stayed"


def test_a_new_quantized_base_is_the_earlier_runs_weights(
    earlier: dict[str, Tensor], tokenizer: Any
) -> None:
    folder, _ = named(earlier, "adamw")
    network, _ = begin(tokenizer, f"start_from={folder}")
    model = ("model=local", f"model.path={folder}/final", "model.dtype=fp32")
    other, _ = begin(tokenizer, *model)
    assert torch.equal(logps(network), logps(other))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("lora", "optimizer=lora optimizer.r=4"),
        ("adamw", "optimizer=lora"),
        ("adamw", "optimizer=qlora"),
    ],
)
def test_an_adapter_on_another_base_than_the_models_has_it_in_final(
    earlier: dict[str, Tensor], tokenizer: Any, tmp_path: Path, name: str, overrides: str
) -> None:
    first, again = tmp_path / "first", (*overrides.split(), f"start_from={tmp_path / 'second'}")
    shutil.copytree(named(earlier, name)[0], first)
    network, origin = trained(tokenizer, f"start_from={first}", *overrides.split())
    leave(network, origin, tokenizer, tmp_path / "second")
    shutil.rmtree(first)
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second" / "final")
    if "qlora" not in overrides:  # whose base peft reads unquantized
        assert (logps(read) - logps(network)).abs().max() < ROUNDING
    third, origin = begin(tokenizer, *again)
    assert origin.words == "the adapter of second goes on as an adapter"
    assert torch.equal(logps(third), logps(network))
    leave(third, origin, tokenizer, tmp_path / "third")
    assert (tmp_path / "third" / "final" / "base" / "model.safetensors").exists()


def test_a_base_keeps_all_its_chat_templates_beside_an_adapter(
    earlier: dict[str, Tensor], tokenizer: Any, tmp_path: Path
) -> None:
    shutil.copytree(named(earlier, "adamw")[0], tmp_path / "first")
    template = Path("additional_chat_templates", "tool_use.jinja")
    (tmp_path / "first" / "final" / template).parent.mkdir()
    (tmp_path / "first" / "final" / template).write_text("{{ messages }}")
    network, origin = begin(tokenizer, "optimizer=lora", f"start_from={tmp_path / 'first'}")
    leave(network, origin, tokenizer, tmp_path / "second")
    assert (tmp_path / "second" / "final" / "base" / template).read_text() == "{{ messages }}"


def test_an_adapter_on_the_models_own_base_has_none_in_final(
    earlier: dict[str, Tensor], tokenizer: Any, tmp_path: Path
) -> None:
    network, origin = begin(tokenizer, f"start_from={named(earlier, 'qlora')[0]}")
    leave(network, origin, tokenizer, tmp_path)
    assert not (tmp_path / "final" / "base").exists()


# What is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["start_from=nowhere"], "start_from=nowhere: there is no such folder"),
        (["start_from=FOLDER/lora/final"], "is not a run folder: no config.yaml"),
        (["start_from=FOLDER/stopped"], "its run is stopped; .* with resume=.*/stopped, then"),
        (["start_from=FOLDER/empty"], "holds no result: its final/ is missing"),
        (["start_from=FOLDER/old"], "an earlier version of orpo_lab may have made it"),
        (
            ["start_from=FOLDER/lora", "model=local", "model.path=FOLDER/adamw/final"],
            "trained on model.path=orpo_lab/tiny .* is another model",
        ),
        (["start_from=FOLDER/lora", "model.revision=v1"], "model.revision=v1 is another model"),
        (["start_from=FOLDER/lora"], "give optimizer=lora .* quantization=none, as it was"),
        (["start_from=FOLDER/qlora", "optimizer.r=4"], "optimizer.r=16 .* quantization=nf4"),
        (
            ["start_from=FOLDER/qlora", "quantization.double_quantization=false"],
            "quantization.double_quantization=True, as it was trained with",
        ),
        (["start_from=FOLDER/qlora", "quantization=int8"], "would undo much of it"),
    ],
)
def test_what_cannot_be_started_from_is_refused_in_one_line(
    load: Load, earlier: dict[str, Tensor], tmp_path: Path, overrides: list[str], said: str
) -> None:
    for folder in earlier:
        shutil.copytree(folder, tmp_path / Path(folder).name)
    for name in ("stopped", "empty", "old"):
        shutil.copytree(tmp_path / "lora", tmp_path / name)
    RunFolder(tmp_path / "stopped").set_status("stopped", "SIGTERM", exit_code=75)
    shutil.rmtree(tmp_path / "empty" / "final")
    RunFolder(tmp_path / "old").write_json("segments.json", [{"config_hash": "hash"}])
    given = load(*(override.replace("FOLDER", str(tmp_path)) for override in overrides))
    with pytest.raises(UserError, match=said) as refusal:
        origin_of(given)
    assert "\n" not in str(refusal.value)


def test_a_base_that_is_named_from_another_folder_is_said_to_be_missing(
    load: Load, earlier: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(named(earlier, "lora")[0], tmp_path / "run")
    recorded = OmegaConf.load(tmp_path / "run" / "config.yaml")
    recorded.model.path = "models/mine"
    OmegaConf.save(recorded, tmp_path / "run" / "config.yaml")
    given = load("model=local", "model.path=models/mine", f"start_from={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"model.path=models/mine, which is not here; give the"):
        origin_of(given)


@pytest.mark.parametrize("changed", ["chat_template", "vocabulary"])
def test_an_earlier_run_with_another_tokenizer_is_refused(
    earlier: dict[str, Tensor], tokenizer: Any, tmp_path: Path, changed: str
) -> None:
    shutil.copytree(named(earlier, "lora")[0], tmp_path / "run")
    origin = origin_of(
        config.load(compose_config("optimizer=lora", f"start_from={tmp_path / 'run'}"))
    )
    origin.check_tokenizer(tokenizer)
    if changed == "chat_template":
        with (tmp_path / "run/final/chat_template.jinja").open("a") as file:
            file.write("{{ 'more' }}")
    else:
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["<another>"])
        other.save_pretrained(tmp_path / "run" / "final")
    with pytest.raises(UserError, match="another vocabulary or chat template"):
        origin.check_tokenizer(tokenizer)


def test_start_from_names_a_folder(load: Load) -> None:
    with pytest.raises(UserError, match="start_from is empty"):
        load("start_from=''")


# What identifies a run


def flip(file: Path) -> None:
    """Change a weight in a file."""
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file, {"format": "pt"})


def test_a_run_is_identified_by_the_content_of_its_start_and_not_by_the_place(
    load: Load, earlier: dict[str, Tensor], tmp_path: Path
) -> None:
    folder, _ = named(earlier, "lora")
    shutil.copytree(folder, tmp_path / "copy")

    def identity_of(place: str) -> str:
        return identity(load(f"start_from={place}"))

    before = identity_of(folder)
    assert before != identity(load())
    assert identity_of(str(tmp_path / "copy")) == before
    (tmp_path / "copy" / "final" / "README.md").write_text("another card")
    (tmp_path / "copy" / "summary.json").write_text("{}")
    assert identity_of(str(tmp_path / "copy")) == before
    flip(tmp_path / "copy" / "final" / "adapter_model.safetensors")
    assert identity_of(str(tmp_path / "copy")) != before


def test_jobs_of_a_sweep_share_the_evaluation_of_one_start(
    load: Load, earlier: dict[str, Tensor], tmp_path: Path
) -> None:
    sweep, made = Sweep(tmp_path), 0
    (sweep.folder / CACHE).mkdir()

    def measure(desc: str) -> Evaluation:
        nonlocal made
        made += 1
        return Evaluation({}, Scores(*[torch.zeros(1)] * 3), [], 0.0)

    pairs: Any = SimpleNamespace(length_guess=None)
    lora, adamw = (f"start_from={named(earlier, name)[0]}" for name in ("lora", "adamw"))
    jobs: list[tuple[int, list[str]]] = [
        (1, []),
        (2, [lora]),
        (2, [lora, "beta=0.2"]),
        (3, [adamw]),
        # Merged, and not gone on with
        (4, [lora, "optimizer.r=4"]),
        (5, [lora, "optimizer=adamw"]),
    ]
    for num, overrides in jobs:
        run._measure_before(load("optimizer=lora", *overrides), measure, pairs, sweep)
        assert made == num


# Whole runs


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sft`, a run of plain SFT, and `orpo`, a run that started from its result."""
    folder, before = tmp_path_factory.mktemp("stages"), Path.cwd()
    write_pairs(folder / "pairs.jsonl")
    os.chdir(folder)
    try:
        start(*TWO_STEPS, "beta=0", "hydra.run.dir=sft")
        start(*TWO_STEPS, "start_from=sft", "optimizer.r=4", "hydra.run.dir=orpo")
    finally:
        os.chdir(before)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_before_is_what_the_first_stage_came_to(two_stages: Path) -> None:
    first, second = (summary_of(two_stages / name) for name in ("sft", "orpo"))
    assert second["before"]["chosen_nll"] == pytest.approx(first["after"]["chosen_nll"], abs=1e-5)
    assert abs(first["before"]["chosen_nll"] - first["after"]["chosen_nll"]) > 1e-3


def test_a_run_says_what_it_started_from_and_its_card_names_no_place(two_stages: Path) -> None:
    place = RunFolder(two_stages / "orpo")
    assert place.read_yaml("config.yaml")["start_from"] == "sft"
    words = "the adapter of sft is merged into its base"
    assert f"start_from: {words}\n" in place.file("run.log").read_text()
    card = place.file("final/README.md").read_text()
    assert f"It began with another run's result: {words}.\n" in card
    assert "The adapter belongs to the model in `base/`" in card
    assert str(two_stages) not in card
    assert "another run" not in (two_stages / "sft" / "final" / "README.md").read_text()


def test_a_run_records_what_tells_its_start_apart(
    two_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = RunFolder(two_stages / "sft").as_start()
    assert began is not None
    assert began["seeds"] == [42]
    assert began["settings"]["method"] == "orpo"
    place = RunFolder(two_stages / "orpo")
    (segment,) = place.segments()
    assert segment["start"] == began
    assert road("dpo", None) == "dpo"
    assert re.fullmatch(r"orpo \w{6} > dpo", road("dpo", began))
    # A run of an earlier version recorded the content alone: the start's record is read where it is
    for name in ("sft", "orpo"):
        shutil.copytree(two_stages / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    place = RunFolder(tmp_path / "orpo")
    assert segment.pop("start") == place.start()
    place.write_json("segments.json", [segment])
    assert place.start() == began
    flip(Path("sft/final/adapter_model.safetensors"))
    assert place.start() is None
    shutil.rmtree("sft")
    assert place.start() is None


def test_a_run_does_not_go_on_from_another_start(
    two_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(two_stages / "sft", tmp_path / "sft")
    write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    again = (*TWO_STEPS, "start_from=sft", "hydra.run.dir=run", "resume=auto")
    with pytest.raises(Stopped):
        start(*again, "train.max_hours=1e-9")
    weights = Path("sft/final/adapter_model.safetensors")
    kept = weights.read_bytes()
    flip(weights)
    for other in (again, (*TWO_STEPS, *again[-2:])):
        with pytest.raises(UserError, match="result in start_from, have changed"):
            start(*other)
    weights.write_bytes(kept)
    start(*again)
    assert RunFolder(Path("run")).is_complete()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("optimizer=qlora", "optimizer=qlora"),
        ("optimizer=lora", "optimizer=lora optimizer.r=4"),
        ("optimizer=qlora", "optimizer=galore optimizer.update_proj_gap=3"),
        ("optimizer=adamw", "optimizer=qlora"),
    ],
)
def test_a_killed_second_stage_ends_where_an_uninterrupted_one_does_bit_for_bit(
    launch: Launch, tmp_path: Path, first: str, second: str
) -> None:
    launch(*first.split(), *SMALL, "beta=0", "train.max_steps=3", "hydra.run.dir=sft")
    common = [*second.split(), *SMALL, "train.max_steps=8", "train.save_steps=4"]
    common.append(f"start_from={tmp_path / 'sft'}")
    launch(*common, "hydra.run.dir=whole")
    killed = signal_after(5, [signal.SIGKILL], tmp_path / "half", *common)
    assert killed.code == -signal.SIGKILL
    done = launch(*common, "resume=half")
    assert "resuming from step" in done.stdout
    assert_same(tmp_path / "whole", tmp_path / "half")
    bases = [tmp_path / name / "final/base/model.safetensors" for name in ("whole", "half")]
    if bases[0].exists():
        assert bases[0].read_bytes() == bases[1].read_bytes()


@pytest.mark.slow
def test_a_sweep_over_two_starts_has_two_settings(launch: Launch, tmp_path: Path) -> None:
    sizes = ("optimizer=lora", *SMALL, "train.max_steps=2")
    for steps in (1, 3):
        launch(*sizes, "beta=0", f"train.max_steps={steps}", f"hydra.run.dir=sft{steps}")
    launch("-m", *sizes, "start_from=sft1,sft3", "beta=0.1,0.2", "hydra.sweep.dir=sweep")
    jobs = Sweep(tmp_path / "sweep").jobs()
    assert [job.status()["state"] for job in jobs] == ["finished"] * 4
    before: dict[str, set[float]] = {}
    for job in jobs:
        origin = job.read_yaml("config.yaml")["start_from"]
        before.setdefault(origin, set()).add(summary_of(job.path)["before"]["chosen_nll"])
    for origin, figures in before.items():
        (figure,) = figures
        after = summary_of(tmp_path / origin)["after"]["chosen_nll"]
        assert figure == pytest.approx(after, abs=1e-5)
    report = (tmp_path / "sweep" / "report.html").read_text()
    assert "start_from=sft1" in report
    assert "start_from=sft3" in report
