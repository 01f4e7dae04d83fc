"""ChatGLM-Efficient-Tuning's arguments (and so ChatGLM-6B-RLHF's): SFT, reward model and PPO, as a command or one JSON file."""

from collections.abc import Iterable
from pathlib import Path

from trueline.data.schemas import COLUMNS
from trueline.interchange.legacy import Conversion, Old, projections
from trueline.interchange.legacy_trainer import DROPPED, convert_training

TITLE = "ChatGLM-Efficient-Tuning"
SCRIPTS = {"rm": "reward", "reward": "reward", "ppo": "ppo", "policy": "ppo", "pt": "sft", "sft": "sft", "finetune": "sft"}
KINDS = {"lora": "lora", "p_tuning": "ptuning", "full": "full", "none": "full", "freeze": "lora"}
SOURCES = (".file_name", ".hf_hub_url", ".script_url")
"""What a registry's entry has one of."""
NAMES = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
"""An entry's columns, and what they are called where nothing else is said."""
REASONS = {
    "stage": "the verb says it",
    "dataset_dir": "part of the file names in data.train",
    "split": "a file is a split",
    "source_prefix": "a system message in the records says it",
    "num_beams": "answers are sampled or greedy; there is no beam search",
    "eval_num_beams": "answers are sampled or greedy; there is no beam search",
    "num_layer_trainable": "single layers are not frozen",
    "name_module_trainable": "single layers are not frozen",
    "prefix_projection": "learned keys and values are trained directly",
    "plot_loss": "every run writes report.html",
    "ignore_pad_token_for_loss": "there is no padding",
    "quantization_bit": "weights are not quantised",
    "quantization_type": "weights are not quantised",
    "double_quantization": "weights are not quantised",
    "use_fast_tokenizer": "there is one tokenizer",
    "cache_dir": "the hub's own",
    "use_auth_token": "the hub's own",
    "model_revision": "a hub id means its newest version",
    "prompt_template": "the template is the model family's",
    "use_v2": "the family is told by the model's config.json",
    **DROPPED,
}


def stage_of(found: dict[str, list[Old]], scripts: str) -> str:
    """The verb: `stage` where there is one, else the script's name, else what only PPO has; without training an evaluation."""
    values = {name: olds[-1].value for name, olds in found.items()}
    if not values.get("do_train", True) or (("do_predict" in values or "do_eval" in values) and "do_train" not in values):
        return "evaluate"
    said = str(values.get("stage", "")) or next((word for word in ("rm", "reward", "ppo", "policy") if f"_{word}" in scripts), "")
    return SCRIPTS.get(said, "ppo" if values.get("reward_model") else "sft")


def convert(it: Conversion, devices: int) -> None:
    """Fills `it` from the arguments of one command."""
    if "model.path" in it.settings:
        it.drop("model_name_or_path", "--model goes before it")
    it.move("model_name_or_path", "model.path")
    it.add("model.path", "THUDM/chatglm-6b", "the old default")
    _data(it)
    _adapter(it)
    _earlier_adapters(it)
    if it.stage in ("ppo", "evaluate"):
        it.move("max_target_length" if it.stage == "ppo" else "max_new_tokens", "sampling.max_new_tokens")
        for name in ("temperature", "top_p", "top_k"):
            it.move(name, f"sampling.{name}")
    if it.stage == "ppo":
        _ppo(it)
    if it.stage == "reward":
        it.add("ranking.loss", "last", "as theirs: the score of the last token")
    convert_training(it, "", devices)
    it.add("run.output", f"runs/{it.stage}", "a place for it")
    it.drop_all(REASONS)


def _data(it: Conversion) -> None:
    folder, names = str(it.get("dataset_dir", "data")), [name.strip() for name in str(it.get("dataset", "alpaca_zh")).split(",")]
    files = [str(Path(folder) / str(it.get(f"{name}.file_name", f"{name}.json"))) for name in names]
    new = "data.eval" if it.stage == "evaluate" else "data.train"
    it.move("dataset", new, lambda value: files, "files of dataset_dir")
    it.add(new, files, "the old default data set")
    known = registered(it.olds)
    for name, file in zip(names, files, strict=True):
        if name in known:
            _entry(it, name, file, new)
        else:
            lacks = "has no" if known else "is not here to look up"
            it.warn(f"{new}: the registry dataset_info.json {lacks} {name}, which is taken for {file}; correct that, or give the registry")
    it.drop_all(dict.fromkeys(known - {*names}, "a data set that this run does not use"))
    if it.stage == "sft":
        it.add("data.train_on", "last", "the old program trained the last answer only; all is a sample for each answer of the history, too")
    if it.stage == "reward":
        it.warn("of ranked answers only the first two were used; data.ranked: all makes every pair")
    lengths = ("max_source_length", "max_target_length")
    longest = int(it.number(lengths[0], 512) + it.number(lengths[1], 512))
    it.add(
        "data.max_length", longest, f"max_source_length {it.get(lengths[0], 512)} and max_target_length {it.get(lengths[1], 512)} together"
    )
    for name in lengths if it.stage != "ppo" else lengths[:1]:
        it.part(name, "data.max_length", "prompt and answer together")
    it.add("data.overlength", "truncate", "the old program cut longer samples without a word; cuts are counted now")
    it.move("max_samples", "data.limit")
    for name in ("dev_ratio", "val_size"):
        if it.stage == "evaluate":
            it.drop(name, "the files are evaluated whole")
        it.move(name, "data.eval_fraction")


def registered(names: Iterable[str]) -> set[str]:
    """The data sets of which the keys of a registry are among `names`."""
    return {name.removesuffix(source) for name in names for source in SOURCES if name.endswith(source)}


def _entry(it: Conversion, name: str, file: str, new: str) -> None:
    """A data set of the registry that the run uses. A hub's name went before a script's, and that before a file's."""
    hub, script = it.get(f"{name}.hf_hub_url"), it.get(f"{name}.script_url")
    if hub or script:
        place = f"the hub's {hub}" if hub else f"made by the program in {script}, which is never run"
        it.warn(f"{new}: {name} is {place}; save its records as {file} (.json, .jsonl, .csv, .parquet), or name their files")
        it.drop_all(dict.fromkeys((f"{name}{source}" for source in SOURCES), f"{file} stands for it; see the warning"))
    it.part(f"{name}.file_name", new, f"the file of {name}")
    it.drop(f"{name}.file_sha1", "another hash was only a warning; tokens are kept by the hash of the file they are of")
    theirs = {part: it.get(f"{name}.columns.{part}", ours if part != "history" else None) for part, ours in NAMES.items()}
    if (theirs["prompt"], theirs["response"]) not in COLUMNS:
        if other := [f"{column} to {NAMES[part]}" for part, column in theirs.items() if column and column != NAMES[part]]:
            it.warn(f"{new}: {name} has columns of other names; in {file} rename {', '.join(other)}")
    it.drop_all({f"{name}.columns": "columns are told by their names (data.format)"})


def _adapter(it: Conversion) -> None:
    kind = str(it.get("finetuning_type", "lora"))
    if kind == "freeze":
        it.warn(f"{it.olds['finetuning_type'].where}: finetuning_type freeze is not there; LoRA, the nearest in memory, is used instead")
    it.move("finetuning_type", "model.adapter.kind", lambda value: KINDS.get(kind, "lora"))
    it.add("model.adapter.kind", "lora", "the old default")
    it.move("lora_rank", "model.adapter.rank")
    it.move("lora_alpha", "model.adapter.alpha")
    if it.stage == "ppo":
        it.drop("lora_dropout", "dropout in PPO would make rollout and training differ")
    it.move("lora_dropout", "model.adapter.dropout")
    it.move("lora_target", "model.adapter.targets", projections)
    if it.settings.get("model.adapter.kind") == "lora":
        it.add("model.adapter.targets", ["q", "k", "v"], "the old default query_key_value")
        if it.stage != "ppo":
            it.add("model.adapter.dropout", 0.1, "the old default")
    it.move("pre_seq_len", "model.adapter.tokens")


def _earlier_adapters(it: Conversion) -> None:
    given = it.get("checkpoint_dir")
    resumed = it.get("resume_lora_training", True)
    if given:
        it.warn(
            f"{it.olds['checkpoint_dir'].where}: checkpoint_dir {given}: merge the adapters into the model first (`trueline export ADAPTER "
            "OUT --merge`, in their order) and name the result with --model"
        )
        if it.stage == "ppo" and resumed:
            it.warn(
                "reference: with resume_lora_training True the KL was to the raw base model; here it is to the model as PPO starts, "
                "with its fine-tuning"
            )
    it.drop("checkpoint_dir", "adapters to start from: merge them first and name the result with --model")
    it.drop("resume_lora_training", "a fresh adapter is trained on the model that model.path names")


def _ppo(it: Conversion) -> None:
    it.move("reward_model", "reward.model")
    it.add("reward.model", "runs/reward/model", "where `trueline reward` leaves it with run.output=runs/reward")
    it.warn(
        f"reward.model: {it.settings['reward.model']} has to be a reward model of `trueline reward`; the old value_head.bin is a pickle, "
        "which is never read"
    )
    for new, value in (
        ("ppo.kl_coefficient", 0.2),
        ("ppo.kl_target", 6.0),
        ("ppo.kl_horizon", 10000),
        ("ppo.gamma", 1.0),
        ("ppo.lam", 0.95),
        ("ppo.clip", 0.2),
        ("ppo.value_clip", 0.2),
        ("ppo.epochs", 1),
        ("sampling.max_new_tokens", 512),
    ):
        it.add(new, value, "the old default")
    it.move("ppo_epochs", "ppo.epochs")
    it.move("init_kl_coef", "ppo.kl_coefficient")
    it.move("target", "ppo.kl_target")
    it.warn("critic: the learned value head was overwritten in every step, so there was none; ours is kept and trained")
    it.warn("advantages were whitened over a device's two answers; they are whitened over all answers of an iteration now")
