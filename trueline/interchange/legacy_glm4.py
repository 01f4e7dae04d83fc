"""GLM-4's finetune_demo: lora.yaml, ptuning_v2.yaml, sft.yaml, in the form of 2024 and the one of 2025 (with `combine`)."""

from trueline.interchange.legacy import Conversion, projections
from trueline.interchange.legacy_trainer import DROPPED, convert_training

TITLE = "GLM-4 finetune_demo"
MODEL = "THUDM/glm-4-9b-chat-hf"
REASONS = {
    "data_config.num_proc": "records are read in one process",
    "freezeV": "only language models are trained here; there is no vision part to freeze",
    "swanlab": "there is no such tracker; numbers are in metrics.jsonl and report.html",
    "peft_config.task_type": "the verb says it",
    "peft_config.inference_mode": "the verb says it",
    "peft_config.bias": "biases are not trained with LoRA",
    "peft_config.num_attention_heads": "the width of a learned key is taken from the model",
    "peft_config.token_dim": "the width of a learned key is taken from the model",
    "peft_config.num_layers": "every layer gets its learned keys and values",
    "peft_config.num_transformer_submodules": "there is one",
    "training_args.generation_config": "the evaluation afterwards takes sampling.* keys; this one is not there",
    **{name: why for name, why in DROPPED.items() if name == "deepspeed"},
}
ADAPTERS = {"LORA": "lora", "PREFIX_TUNING": "ptuning"}


def convert(it: Conversion, devices: int) -> None:
    """Fills `it` from the keys of one file."""
    it.add("model.path", MODEL, "the old command line named the model; --model names another")
    it.move("data_config.train_file", "data.train", lambda value: [value])
    it.move("data_config.val_file", "data.eval", lambda value: [value])
    it.follow("data_config.test_file", "data.eval")
    _lengths(it)
    _turns(it)
    _adapter(it)
    for name in ("max_new_tokens", "temperature", "top_p", "top_k"):
        it.follow(f"training_args.generation_config.{name}", f"sampling.{name}")
    if it.settings.get("data.eval") is None:
        it.drop("training_args.eval_steps", "there is no val_file")
    convert_training(it, "training_args.", devices)
    it.add("run.output", "runs/sft", "a place for it")
    it.add("model.recompute", True, "always on in the old program; false is faster where there is memory")
    it.drop_all(REASONS)
    it.warn("resuming: the old fourth argument `no` (and `0`) skipped the training; here run.resume is auto, never or a step number")
    it.warn("tool calls written as JSON in an assistant's content are read as calls, in the form GLM-4's own server parses")


def _lengths(it: Conversion) -> None:
    longest = int(it.number("max_input_length", 512) + it.number("max_output_length", 512))
    remark = "prompt and answer together"
    if "max_input_length" in it.olds or "max_output_length" in it.olds:
        first = "max_input_length" if "max_input_length" in it.olds else "max_output_length"
        it.move(first, "data.max_length", lambda value: longest, remark)
        it.part("max_output_length", "data.max_length", remark)
    it.add("data.overlength", "truncate", "the old program cut longer samples without a word; cuts are counted now")


def _turns(it: Conversion) -> None:
    if it.get("combine"):
        it.warn(
            f"{it.olds['combine'].where}: combine trained only the last answer of each conversation, and its evaluation saw that answer; "
            "data.train_on: last keeps the first and not the second; all trains every answer"
        )
        it.move("combine", "data.train_on", lambda value: "last")
    elif "combine" in it.olds:
        it.move("combine", "data.train_on", lambda value: "all")
    else:
        it.warn("the evaluation of this version looked at the first 50 rows of val_file only; all rows are used now")


def _adapter(it: Conversion) -> None:
    kind = ADAPTERS.get(str(it.get("peft_config.peft_type", "")).upper())
    if "peft_config.peft_type" not in it.olds:
        it.add("model.adapter.kind", "full", "no peft_config: all weights are trained")
    elif kind is None:
        old = it.olds["peft_config.peft_type"]
        it.warn(f"{old.where}: peft_type {old.value} is not there; LoRA is used instead")
    it.move("peft_config.peft_type", "model.adapter.kind", lambda value: kind or "lora")
    it.move("peft_config.r", "model.adapter.rank")
    it.move("peft_config.lora_alpha", "model.adapter.alpha")
    it.move("peft_config.lora_dropout", "model.adapter.dropout")
    it.move("peft_config.target_modules", "model.adapter.targets", projections)
    if kind == "lora":
        it.add("model.adapter.targets", ["q", "k", "v"], "PEFT's choice for this model: query_key_value")
    it.move("peft_config.num_virtual_tokens", "model.adapter.tokens")
