"""transformers' training arguments, which two of the old programs share, as batch, optimizer and run settings."""

from trueline.interchange.legacy import Conversion, by_reason

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
DEEPSPEED = "DeepSpeed is not used: sharding over processes is FSDP's, set by mesh.*; memory is saved by model.recompute"
DROPPED = by_reason({
    "DeepSpeed is not used: sharding over processes is FSDP's, set by mesh.*; memory is saved by model.recompute": "deepspeed",
    "records are tokenised once, ahead of the steps; there are no loader processes": "dataloader_num_workers preprocessing_num_workers",
    "there are no loader processes": "dataloader_pin_memory",
    "fields that are not needed are never in a batch": "remove_unused_columns",
    "there is one level of messages": "log_level",
    "run.log_every counts steps": "logging_strategy",
    "everything of a run is in run.output": "logging_dir",
    "the first step is always shown": "logging_first_step",
    "evaluation packs as many tokens as batch.max_tokens; the numbers do not depend on it": "per_device_eval_batch_size",
    "`trueline evaluate` generates; training measures the loss": "predict_with_generate",
    "a run folder is never overwritten; run.resume says whether to go on": "overwrite_output_dir",
    "there is no cache that could be stale": "overwrite_cache",
    "numbers are in metrics.jsonl and report.html; run.tracker=tensorboard writes those too": "report_to",
    "AdamW is the optimizer, with float32 masters": "optim",
    "there is no DDP wrapper": "ddp_find_unused_parameters ddp_timeout",
    "weights are bfloat16 on an accelerator and float32 on a CPU (model.dtype); float16 overflowed in these programs": "fp16",
    "bfloat16 is what model.dtype: auto takes on an accelerator": "bf16",
    "left to PyTorch": "tf32",
    "batches are packed without padding": "group_by_length",
    "the verb says what is done": "do_train do_eval do_predict",
    "masks come from the template": "label_names",
    "there is none in supervised fine-tuning": "label_smoothing_factor",
    "every checkpoint has its evaluation in metrics.jsonl; choose there": "load_best_model_at_end metric_for_best_model",
    "nothing is uploaded": "push_to_hub",
    "progress is shown on a terminal only": "disable_tqdm",
    "given by the launcher": "local_rank",
    "always": "save_safetensors",
    "a loss that is not finite always stops the run and names the tensor": "debug",
    "run.output names the run": "run_name",
    "there is one loop": "use_legacy_prediction_loop",
    "there is one kind of recomputation": "gradient_checkpointing_kwargs",
    "run.resume: auto goes on from the newest checkpoint that verifies, N from step N": "resume_from_checkpoint",
})  # fmt: skip


def convert_training(it: Conversion, prefix: str, devices: int) -> None:
    """Moves what stands under `prefix`; adds the defaults of transformers where ours differ."""
    _batch(it, prefix, devices)
    _length(it, prefix)
    for old, new in (
        ("output_dir", "run.output"),
        ("learning_rate", "optimizer.lr"),
        ("weight_decay", "optimizer.weight_decay"),
        ("adam_epsilon", "optimizer.eps"),
        ("max_grad_norm", "optimizer.max_norm"),
        ("seed", "run.seed"),
        ("logging_steps", "run.log_every"),
        ("save_total_limit", "run.keep"),
        ("gradient_checkpointing", "model.recompute"),
    ):
        it.move(prefix + old, new)
    _betas(it, prefix)
    _schedule(it, prefix)
    _cadence(it, prefix, "save_steps", ("save_strategy",), "run.save_every", 500)
    _cadence(it, prefix, "eval_steps", ("eval_strategy", "evaluation_strategy"), "run.eval_every")
    it.add("optimizer.lr", 5e-5, "transformers' default")
    it.add("run.seed", 42, "transformers' default")
    it.add("run.keep", 1000, "transformers keeps every checkpoint; lower it to save disk space")
    if it.get(prefix + "fp16"):
        it.warn("fp16: training in float16 gave losses that were not numbers; this run uses bfloat16 or float32")
    it.drop_all({prefix + name: why for name, why in DROPPED.items()})


def _batch(it: Conversion, prefix: str, devices: int) -> None:
    each, accumulated = prefix + "per_device_train_batch_size", prefix + "gradient_accumulation_steps"
    samples, times = int(it.number(each, 8)), int(it.number(accumulated, 1))
    new = "rollout.prompts" if it.stage == "ppo" else "batch.sequences"
    if new in it.known:
        sum_of = f"{samples} per device x {times} accumulated x {devices} {'device' if devices == 1 else 'devices'}"
        if each not in it.olds:
            it.add(new, samples * times * devices, f"transformers' default batch: {sum_of}")
        it.move(each, new, lambda value: samples * times * devices, sum_of)
        it.part(accumulated, new, sum_of)
    it.drop_all({each: "nothing is trained", accumulated: "nothing is trained"})


def _length(it: Conversion, prefix: str) -> None:
    if it.number(prefix + "max_steps", -1) > 0:
        it.move(prefix + "max_steps", "run.steps")
        it.drop(prefix + "num_train_epochs", "max_steps goes before it")
    else:
        it.drop(prefix + "max_steps", "not positive, so epochs count")
        it.move(prefix + "num_train_epochs", "run.epochs")
        it.add("run.epochs", 3, "transformers' default")


def _betas(it: Conversion, prefix: str) -> None:
    first, second = prefix + "adam_beta1", prefix + "adam_beta2"
    betas = [it.number(first, 0.9), it.number(second, 0.999)]
    if not (first in it.olds or second in it.olds):
        it.add("optimizer.betas", betas, "transformers' default")
        return
    it.move(first if first in it.olds else second, "optimizer.betas", lambda value: betas)
    it.part(second, "optimizer.betas", "with adam_beta1")


def _schedule(it: Conversion, prefix: str) -> None:
    steps, share, kind = prefix + "warmup_steps", prefix + "warmup_ratio", prefix + "lr_scheduler_type"
    if it.number(steps, 0) >= 1:
        it.move(steps, "optimizer.warmup", int, "steps")
        it.drop(share, "warmup_steps goes before it")
    else:
        it.drop(steps, "0: warmup_ratio counts")
        it.move(share, "optimizer.warmup", remark="share of all steps")
        it.add("optimizer.warmup", 0, "transformers' default")
    found = str(it.get(kind, "linear"))
    if found not in SCHEDULES:
        it.warn(f"{it.olds[kind].where}: {kind} {found} is not there; linear is used instead")
    it.move(kind, "optimizer.schedule", lambda value: SCHEDULES.get(str(value), "linear"))
    it.add("optimizer.schedule", "linear", "transformers' default")


def _cadence(it: Conversion, prefix: str, steps: str, strategies: tuple[str, ...], new: str, default: int = 0) -> None:
    strategy = next((str(it.get(prefix + name)) for name in strategies if it.get(prefix + name) is not None), "steps")
    if strategy in ("no", "False", "epoch"):
        it.drop(prefix + steps, f"the strategy is {'no' if strategy == 'False' else strategy}")
    if strategy == "epoch":
        it.warn(f"{strategies[0]}: epoch: {new} counts steps; set it to the number of steps of an epoch")
    it.move(prefix + steps, new)
    if default and strategy == "steps":
        it.add(new, default, "transformers' default")
    for name in strategies:
        it.drop(prefix + name, f"{new} says it: a number of steps, or 0 for the end only")
