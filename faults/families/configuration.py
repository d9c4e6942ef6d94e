"""What a command line can get wrong: names, types, ranges, choices that do not go together."""

from collections.abc import Callable, Iterator

import yaml

from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, refused, silent, status

# Command line, and what the refusal is to say
WRONG = (
    ("betta=0.2", "Could not override 'betta'.*Did you mean 'beta'"),
    ("+betta=0.2", "unknown key: betta"),
    ("train.max_step=6", "Did you mean 'train.max_steps'"),
    ("optimizer=galor", "Did you mean 'galore'"),
    ("beta_shedule=linear", "beta_shedule"),
    ("beta=abc", "beta=abc .*could not be converted to Float"),
    ("beta=-1", "beta=-1.0 must be a number of at least 0"),
    ("beta=nan", "beta=nan must be a number"),
    ("beta=inf", "beta=inf must be a number"),
    ("seed=-1", "seed=-1 must be at least 0"),
    ("seed=1.5", "seed"),
    ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate=-0.001"),
    ("optimizer.adam_beta2=1", r"optimizer.adam_beta2 must be in \[0, 1\)"),
    ("optimizer.r=0", "optimizer.r=0 must be at least 1"),
    ("optimizer.rank=8", "rank"),
    ("train.batch_size=0", "train.batch_size=0 must be at least 1"),
    ("train.batch_size=4000", "train.batch_size=4000 is above the 1920 training pairs"),
    ("train.num_epochs=1 train.max_steps=3", "exactly one of train.max_steps and train.num_epochs"),
    ("optimizer.lr=1e-3", "Did you mean 'optimizer.learning_rate'"),
    ("per_device_train_batch_size=4", "Did you mean 'train.batch_size'"),
    ("optimizer.rank=4", "optimizer.rank is a key of optimizer=galore"),
    ("seed=4294967296", "seed=4294967296 must be below"),
    ("~seed", "~seed: no key can be taken away"),
    ("~optimizer.r", "~optimizer.r: no key can be taken away"),
    ("tracker=null", "tracker=null names no option"),
    ("hydra.job.chdir=true", "hydra.job.chdir=true would look"),
    ("resume=q/0-beta=0.05,seed=1", "resume=q/0-beta=0.05,seed=1 is not a run folder"),
    ("resume=q/\u00fcber(1)", r"resume=q/\u00fcber\(1\) is not a run folder"),
    ("-m seed=range(0) hydra.sweep.dir=sweep", "this sweep has no job"),
    ("train.max_steps=null", "exactly one of train.max_steps and train.num_epochs"),
    ("train.warmup_steps=1.5", "train.warmup_steps=1.5 must be a whole number"),
    ("train.lr_scheduler_type=cosin", "train.lr_scheduler_type=cosin must be one of"),
    ("train.save_steps=0", "train.save_steps=0 must be at least 1"),
    ("dataset.max_length=300", "above the model's context of 256"),
    ("dataset.max_prompt_length=96", "dataset.max_prompt_length=96 must be below"),
    ("dataset.num_eval=100000", "dataset.num_eval=100000 is more than"),
    ("dataset.overlong=cut", "dataset.overlong=cut must be one of"),
    ("beta_schedule=step beta_schedule.milestones=[0.7,0.3]", "must rise"),
    ("optimizer=galore quantization=nf4", "quantized weights cannot be trained"),
    ("optimizer=qlora quantization=none", "optimizer=qlora trains adapters on a quantized base"),
    ("optimizer=galore optimizer.rank=128", "there is nothing to project"),
    ("engine=trl method=orpo_paper", "engine=trl can only compute method=orpo"),
    ("engine=trl engine.micro_batch_size=3", "must be a multiple of engine.micro_batch_size=3"),
    ("engine.tokens_per_microbatch=100", "engine.tokens_per_microbatch=100 must be at least 192"),
    ("model=hub", "model.path has no value"),
    ("model=local model.path=./nowhere", "neither a folder nor a hub name"),
    ("model=mistral_7b", "cannot be loaded"),
    ("resume=nowhere", "resume=nowhere is not a run folder"),
    ("hydra.run.dir=/proc/nowhere", "/proc/nowhere.*choose another folder"),
)
# Every so many in a new interpreter, as users type them
FRESH = 5


def faults(bench: Bench) -> Iterator[Injection]:
    """Return a fault for each wrong command line."""
    for number, (line, says) in enumerate(WRONG):
        yield Injection(line, _refuses(line, says, fresh=number % FRESH == 0))
    for override, text in (("name=1e-4", "1e-4"), ("model.revision=1.10", "1.10")):
        yield Injection(override, _kept_as_typed(override, text))
    yield Injection("-m optimizer=qlora,galore optimizer.r=2,4", _the_fitting_ones_run)


def _refuses(line: str, says: str, *, fresh: bool) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        place = (
            []
            if "hydra.run.dir" in line or "resume" in line or "-m" in line.split()
            else ["hydra.run.dir=run"]
        )
        done = bench.run(*line.split(), "tracker=none", *place, fresh=fresh)
        return refused(done, bench.path("run"), says)

    return happen


def _kept_as_typed(override: str, text: str) -> Callable[[Bench], Outcome]:
    """Text that looks like a number must be in config.yaml as it was typed."""
    key = override.partition("=")[0]

    def happen(bench: Bench) -> Outcome:
        done = bench.run(*UNTRACKED, override, "hydra.run.dir=run")
        value = yaml.safe_load(bench.path("run/config.yaml").read_text())
        for part in key.split("."):
            value = value[part]
        if done.code or value != text:
            return silent(f"exit code {done.code}, {key} is {value!r}")
        return Outcome(Ending.SURVIVED)

    return happen


def _the_fitting_ones_run(bench: Bench) -> Outcome:
    """Of four combinations two do not fit: they fail with a line each, and the others run."""
    lines = ("optimizer=qlora,galore", "optimizer.r=2,4", "hydra.sweep.dir=sweep")
    done = bench.run("-m", *UNTRACKED, *lines)
    states = [status(path.parent) for path in bench.path("sweep").glob("*/status.json")]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.code != 1 or states != ["finished"] * 2 or len(errors) != 2:
        return silent(f"exit code {done.code}, {states}, {errors}")
    return Outcome(Ending.REFUSED)
