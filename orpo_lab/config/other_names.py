"""What papers and other trainers call our keys; only the texts of errors read this table.

The names are those of transformers, TRL, PEFT, bitsandbytes, axolotl and LLaMA-Factory. A name that
is the last part of one of our keys (`max_length`, `save_steps`) needs no entry.
"""

from typing import NamedTuple


class Ours(NamedTuple):
    """What a name of another trainer is here."""

    name: str
    """A key, a group, or an option of a group, such as `quantization=nf4`."""
    note: str = ""
    """Where the meaning differs: in what. Empty: it does not."""


BATCH = "pairs per optimizer step: per device x accumulation x devices"
LENGTH = "prompt plus completion, in tokens"
CHOICE = "qlora, lora, galore or adamw"
EVERY_LAYER = "adapters are on every linear layer"
MEMORY = "the memory, in tokens; engine=trl counts it in pairs, by engine.micro_batch_size"
PAIRED = "orpo, sft, dpo, ipo, kto, simpo or cpo"

ALSO_CALLED = {
    "adapter": Ours("optimizer", CHOICE),
    "attn_implementation": Ours("model.attention"),
    "base_model": Ours("model.path", "with model=hub or model=local"),
    "bf16": Ours("model.dtype", "model.dtype=bf16"),
    "bnb_4bit_compute_dtype": Ours("model.dtype"),
    "bnb_4bit_quant_type": Ours("quantization=nf4", "optimizer=qlora brings it"),
    "bnb_4bit_use_double_quant": Ours("quantization.double_quantization"),
    "cpo_alpha": Ours("method.sft_weight"),
    "cutoff_len": Ours("dataset.max_length", LENGTH),
    "data_path": Ours("dataset.train_path", "with dataset=file"),
    "data_seed": Ours("seed"),
    "dataset_name": Ours("dataset.path", "with dataset=hub"),
    "dataset_num_proc": Ours("dataset.num_proc"),
    "datasets": Ours("dataset"),
    "epochs": Ours("train.num_epochs"),
    "eval_batch_size": Ours("engine.tokens_per_microbatch", MEMORY),
    "eval_strategy": Ours("train.eval_steps"),
    "evaluation_strategy": Ours("train.eval_steps"),
    "finetuning_type": Ours("optimizer", CHOICE),
    "flash_attention": Ours("model.attention"),
    "flash_attn": Ours("model.attention"),
    "fp16": Ours("model.dtype", "model.dtype=fp16"),
    "galore_rank": Ours("optimizer.rank", "with optimizer=galore"),
    "galore_scale": Ours("optimizer.scale", "with optimizer=galore"),
    "galore_update_interval": Ours("optimizer.update_proj_gap", "with optimizer=galore"),
    "gradient_accumulation_steps": Ours("train.batch_size", BATCH),
    "lambda": Ours("beta"),
    "learning_rate": Ours("optimizer.learning_rate"),
    "load_in_4bit": Ours("quantization=nf4", "optimizer=qlora brings it"),
    "load_in_8bit": Ours("quantization=int8", "with optimizer=qlora"),
    "lora_alpha": Ours("optimizer.alpha"),
    "lora_dropout": Ours("optimizer.dropout"),
    "lora_r": Ours("optimizer.r"),
    "lora_rank": Ours("optimizer.r"),
    "lora_target": Ours("optimizer=lora", EVERY_LAYER),
    "lora_target_modules": Ours("optimizer=lora", EVERY_LAYER),
    "loss_type": Ours("method", PAIRED),
    "lr": Ours("optimizer.learning_rate"),
    "lr_scheduler": Ours("train.lr_scheduler_type"),
    "max_completion_length": Ours("dataset.max_length", LENGTH),
    "max_samples": Ours("dataset.num_train"),
    "max_seq_length": Ours("dataset.max_length", LENGTH),
    "micro_batch_size": Ours("engine.tokens_per_microbatch", MEMORY),
    "model_max_length": Ours("dataset.max_length", LENGTH),
    "model_name": Ours("model.path", "with model=hub or model=local"),
    "model_name_or_path": Ours("model.path", "with model=hub or model=local"),
    "model_revision": Ours("model.revision"),
    "num_train_epochs": Ours("train.num_epochs"),
    "optim": Ours("optimizer", CHOICE),
    "optim_args": Ours("optimizer.rank", "GaLore's settings are keys of optimizer=galore"),
    "optim_target_modules": Ours("optimizer=galore", "every linear layer is projected"),
    "orpo_alpha": Ours("beta"),
    "output_dir": Ours("hydra.run.dir"),
    "packing": Ours("engine=shared_prefix", "rows are always packed, without padding"),
    "per_device_eval_batch_size": Ours("engine.tokens_per_microbatch", MEMORY),
    "per_device_train_batch_size": Ours("train.batch_size", BATCH),
    "pref_beta": Ours("beta"),
    "pref_ftx": Ours("method.sft_weight", "with method=cpo"),
    "pref_loss": Ours("method", PAIRED),
    "preprocessing_num_workers": Ours("dataset.num_proc"),
    "ref_model": Ours("start_from", "the start is the reference"),
    "report_to": Ours("tracker"),
    "resume_from_checkpoint": Ours("resume"),
    "rl": Ours("method", PAIRED),
    "rpo_alpha": Ours("method.sft_weight", "with method=cpo"),
    "run_name": Ours("name"),
    "save_strategy": Ours("train.save_steps"),
    "save_total_limit": Ours("train.num_checkpoints"),
    "sequence_len": Ours("dataset.max_length", LENGTH),
    "simpo_gamma": Ours("method.gamma", "with method=simpo"),
    "stage": Ours("method", PAIRED),
    "target_modules": Ours("optimizer=lora", EVERY_LAYER),
    "tau": Ours("beta", "with method=ipo"),
    "torch_dtype": Ours("model.dtype"),
    "train_file": Ours("dataset.train_path", "with dataset=file"),
    "truncation_mode": Ours("dataset.overlong", "drop, cut_prompt or cut_completion"),
    "use_peft": Ours("optimizer=lora"),
    "val_set_size": Ours("dataset.num_eval", "a number of pairs"),
    "wandb_entity": Ours("tracker.entity"),
    "wandb_project": Ours("tracker.project"),
    "warmup_ratio": Ours("train.warmup_steps", "below 1 it is a fraction of the run"),
}
