"""Old configurations become ours: every key is accounted for once, units are converted, known mistakes are named."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes.commands import Commands
from trueline.config.load import load_config
from trueline.config.schema import STAGES
from trueline.errors import UserError
from trueline.interchange.legacy import Conversion, projections, read_old
from trueline.recipes.legacy import convert, nested

DEMO: dict[str, Any] = {
    "data_config": {"train_file": "train.jsonl", "val_file": "dev.jsonl", "test_file": "test.jsonl", "num_proc": 1},
    "max_input_length": 512,
    "max_output_length": 500,
    "training_args": {
        "output_dir": "./output", "max_steps": 3000, "learning_rate": 5e-4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "dataloader_num_workers": 16, "save_strategy": "steps", "save_steps": 500, "eval_steps": 250,
        "evaluation_strategy": "steps", "logging_steps": 10, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "adam_beta2": 0.98,
        "generation_config": {"max_new_tokens": 512}, "deepspeed": "configs/ds_zero_3.json",
    },
    "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
}  # fmt: skip
MINDRLHF = """
seed: 7
output_dir: './output'
load_checkpoint: ''
use_parallel: True
runner_config: {{epochs: 10, batch_size: 1, sink_mode: True}}
optimizer: {{type: AdamW, beta1: 0.9, beta2: 0.95, eps: 1.e-8, learning_rate: 5.0e-6, weight_decay: 0.01}}
lr_schedule: {{type: CosineWithWarmUpLR, learning_rate: 5.0e-6, lr_end: 5.0e-7, warmup_ratio: 0.1, total_steps: -1}}
runner_wrapper: {{type: MFTrainOneStepCell, use_clip_grad: True}}
train_dataset: &train
  data_loader: {{type: MindDataset, dataset_dir: "", shuffle: True}}
  input_columns: [chosen_input_ids, rejected_input_ids]
train_dataset_task: {{type: {task}, dataset_config: *train}}
use_parallel: True
parallel_config: {{data_parallel: 8, model_parallel: 1}}
recompute_config: {{recompute: True}}
callbacks:
  - type: MFLossMonitor
  - {{type: CheckpointMonitor, save_checkpoint_steps: 5000, keep_checkpoint_max: 1}}
context: {{device_target: Ascend}}
model:
  model_config: {{type: {kind}, seq_length: 4096, {more}}}
  arch: {{type: {arch}}}
"""
GLM = "hidden_size: 4096, num_layers: 20, rope_ratio: {ratio}, eos_token_id: [151329, 151336], pad_token_id: 151329, max_decode_length: 512"


def converted(*files: str | Path, devices: int = 1) -> Conversion:
    """The conversion, with every key of the input found in exactly one place, and settings that the schema takes."""
    given, scripts = read_old([str(file) for file in files], [])
    it = convert(given, scripts, "the files", devices)
    ends = Counter((old.name, old.where) for old in [*(old for old, *_ in it.moved), *(old for old, _ in it.dropped), *it.unknown])
    assert ends == Counter((old.name, old.where) for olds in given.values() for old in olds)
    assert it.settings.keys() == {new for _, new, *_ in it.moved} | {new for new, *_ in it.added}
    return it


def loaded(it: Conversion, tmp_path: Path) -> Any:
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(nested(it)))
    return load_config(STAGES[it.stage], [path])


def written(path: Path, text: str | dict[str, Any]) -> Path:
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return path


def warned(it: Conversion, words: str) -> bool:
    return any(words in sentence for sentence in it.warnings)


def reasons(it: Conversion) -> dict[str, str]:
    return {old.name: why for old, why in it.dropped}


def test_demo_lora(tmp_path: Path) -> None:
    it = converted(written(tmp_path / "lora.yaml", DEMO), devices=4)
    config = loaded(it, tmp_path)
    adapter = config.model.adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == ("lora", 8, 32, 0.1, ("q", "k", "v"))
    assert (config.data.train, config.data.eval, config.data.max_length) == (("train.jsonl",), ("dev.jsonl",), 1012)
    assert config.batch.sequences == 2 * 4 * 4
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.warmup, config.optimizer.schedule) == (
        5e-4,
        (0.9, 0.98),
        0.1,
        "cosine",
    )
    run = config.run
    assert (run.steps, run.epochs, run.save_every, run.eval_every, run.log_every, run.seed) == (3000, None, 500, 250, 10, 42)
    assert it.evaluate == {"data.eval": "test.jsonl", "sampling.max_new_tokens": 512}
    assert "FSDP" in reasons(it)["training_args.deepspeed"] and not it.unknown
    assert warned(it, "first 50 rows") and warned(it, "`no` (and `0`) skipped") and warned(it, "tool calls")


def test_demo_prefix_and_full_and_last_turn(tmp_path: Path) -> None:
    prefix = DEMO | {"peft_config": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 512, "num_attention_heads": 2, "token_dim": 256}}
    adapter = loaded(converted(written(tmp_path / "p.yaml", prefix)), tmp_path).model.adapter
    assert (adapter.kind, adapter.tokens) == ("ptuning", 512)
    later = {name: value for name, value in DEMO.items() if name != "peft_config"} | {"combine": True, "freezeV": True, "swanlab": "local"}
    it = converted(written(tmp_path / "later.yaml", later))
    config = loaded(it, tmp_path)
    assert config.model.adapter.kind == "full" and config.data.train_on == "last"
    assert warned(it, "combine trained only the last answer") and not warned(it, "first 50 rows")
    assert {"freezeV", "swanlab"} <= reasons(it).keys()


def test_epochs_steps_and_strategies(tmp_path: Path) -> None:
    arguments = {
        "num_train_epochs": 2,
        "warmup_steps": 20,
        "warmup_ratio": 0.5,
        "save_strategy": "no",
        "save_steps": 9,
        "eval_strategy": "no",
    }
    it = converted(written(tmp_path / "a.yaml", {"data_config": {"train_file": "t.jsonl"}, "training_args": arguments}))
    config = loaded(it, tmp_path)
    assert (config.run.epochs, config.run.steps, config.run.save_every, config.run.eval_every) == (2, None, 0, 0)
    assert config.optimizer.warmup == 20 and config.optimizer.lr == 5e-5 and config.batch.sequences == 8  # transformers' defaults
    both = arguments | {"max_steps": 5}
    config = loaded(converted(written(tmp_path / "b.yaml", {"training_args": both, "data_config": {"train_file": "t.jsonl"}})), tmp_path)
    assert (config.run.epochs, config.run.steps) == (None, 5)


def test_unknown_keys_and_deepspeed_files(tmp_path: Path) -> None:
    ds = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
    beside = tmp_path / "ds_zero_3.json"
    beside.write_text(json.dumps(ds, indent=1))
    strange = DEMO | {"training_args": DEMO["training_args"] | {"lerning_rate": 1}}
    it = converted(written(tmp_path / "lora.yaml", strange), beside)
    assert [(old.name, re.sub(r"\d+$", "N", Path(old.where).name)) for old in it.unknown] == [("training_args.lerning_rate", "lora.yaml:N")]
    assert {why for name, why in reasons(it).items() if name.startswith(("zero", "bf16", "train_micro"))} == {reasons(it)["bf16.enabled"]}
    with pytest.raises(UserError, match="a DeepSpeed configuration alone"):
        converted(beside)
    with pytest.raises(UserError, match="none of the configurations known here: looked for training_args"):
        converted(written(tmp_path / "other.yaml", {"a": 1}))
    with pytest.raises(UserError, match="lora.yaml:.*found 'auto', expected a number"):
        converted(written(tmp_path / "lora.yaml", {"training_args": {"per_device_train_batch_size": "auto"}}))


def ppo_files(tmp_path: Path) -> list[Path]:
    model = MINDRLHF.format(task="X", kind="ChatGLM2Config", arch="ChatGLM2ForConditionalGeneration", more="do_sample: False, top_k: 1, {}")
    train = written(tmp_path / "finetune.yaml", model.replace("{}", GLM.format(ratio=1)))
    predict = written(tmp_path / "predict.yaml", model.replace("{}", GLM.format(ratio=500)))
    keys = "class PPOConfig:\n    epochs: int = 2\n    batch_size: int = 2\n    num_rollouts: int = 16\n    kl_coef: float = 0.03\n"
    keys += "    gamma: float = 0.9\n    lam: float = 0.95\n    cliprange: float = 0.3  # a remark\n    pretrain_coef: float = 0.9\n"
    keys += "    lr: float = 9.0e-6\n    start_lr: float = 8e-6\n    end_lr: float = 8e-7\n    warmup_step: int = 3200\n"
    keys += "    decay_steps: int = 200000\n"
    keys += "    weight_decay: float = 0.01\n    is_shared_backbone: bool = True\n    init_kl_coef: float = 0.1\n"
    keys += "    save_ckpt_dir: str = './out'\n"
    return [predict, train, written(tmp_path / "ppo_configs.py", keys)]


def test_mindrlhf_ppo(tmp_path: Path) -> None:
    it = converted(*ppo_files(tmp_path), "cliprange_value=0.1")
    config = loaded(it, tmp_path)
    assert it.stage == "ppo" and config.model.path == "THUDM/glm-4-9b-chat-hf" and config.model.recompute
    ppo = config.ppo
    assert (ppo.kl_coefficient, ppo.gamma, ppo.lam, ppo.clip, ppo.value_clip, ppo.whiten) == (0.03, 0.9, 0.95, 0.3, 0.1, False)
    assert (ppo.epochs, ppo.minibatches, config.rollout.prompts, config.run.steps) == (2, 8, 16, 10)
    assert ppo.ptx_coefficient == pytest.approx(9.0) and config.data.ptx  # 0.9 : 0.1
    rate = config.optimizer
    assert (rate.lr, rate.floor, rate.warmup, rate.weight_decay, rate.max_norm) == (8e-6, 0.1, 0.016, 0.1, 10.0)
    assert (config.sampling.temperature, config.sampling.top_k, config.sampling.max_new_tokens, config.data.max_length) == (
        1.0,
        0,
        512,
        4096,
    )
    assert str(config.run.output) == "out" and config.run.save_every == 5000
    assert reasons(it)["lr"] == reasons(it)["weight_decay"] == "the old program never read it"
    for words in (
        "num_layers 20",
        "rope_ratio is 500",
        "also a stop token",
        "was added to the reward",
        "greedy",
        "padded with the pad token",
    ):
        assert warned(it, words), words
    assert warned(it, "gamma and lam were ignored") and warned(it, "sigmoid") and warned(it, "never left the warm-up")


def test_a_pretraining_share_of_nothing_is_no_mix(tmp_path: Path) -> None:
    config = loaded(converted(*ppo_files(tmp_path), "pretrain_coef=0.0"), tmp_path)
    assert config.ppo.ptx_coefficient == 0 and not config.data.ptx


@pytest.mark.parametrize(("alpha", "beta", "wanted"), [(1.0, 0.2, (0.2, 0.2)), (0.3, 1.0, (0.1, 0.3)), (1.0, 1.0, (0.1, 1.0))])
def test_mindrlhf_dpo(alpha: float, beta: float, wanted: tuple[float, float], tmp_path: Path) -> None:
    """alpha DPO + beta SFT with beta twice in the first version, DPO + alpha SFT in the later one."""
    more = f"hidden_size: 3584, num_layers: 28, alpha: {alpha}, beta: {beta}"
    it = converted(written(tmp_path / "dpo.yaml", MINDRLHF.format(task="DPODataset", kind="LlamaConfig", arch="Qwen7BDPO", more=more)))
    config = loaded(it, tmp_path)
    assert it.stage == "dpo" and (config.dpo.beta, config.dpo.sft_weight) == wanted
    assert warned(it, "temperature and the weight of the SFT term") == (beta < 1) and warned(it, "means per token") == (beta == 1)
    assert (config.run.epochs, config.batch.sequences, config.run.keep, config.run.seed) == (10, 8, 1, 7)
    assert (config.optimizer.lr, config.optimizer.floor, config.optimizer.warmup) == (5e-6, 0.1, 0.1)
    assert config.model.path == "Qwen/Qwen2-7B-Instruct" and config.optimizer.betas == (0.9, 0.95)


def test_mindrlhf_dpo_launch(tmp_path: Path) -> None:
    """The launcher takes the command as one argument in quotes, over several lines; the model file it names is read."""
    text = MINDRLHF.format(task="DPODataset", kind="LlamaConfig", arch="Qwen7BDPO", more="num_layers: 28, alpha: 1.0, beta: 0.1")
    written(tmp_path / "dpo.yaml", text)
    command = 'bash scripts/msrun_launcher.sh \\\n "run_dpo.py \\\n --config dpo.yaml --task text_generation \\\n --use_parallel True \\\n'
    command += ' --train_dataset pairs.mindrecord --load_checkpoint ./sft --run_mode train" \\\n 8 8118 log True 600\n'
    it = converted(written(tmp_path / "run.sh", command))
    config = loaded(it, tmp_path)
    assert it.stage == "dpo" and config.data.train == ("pairs.mindrecord",) and config.batch.sequences == 8 and not it.unknown
    (tmp_path / "dpo.yaml").unlink()
    assert converted(tmp_path / "run.sh").stage == "dpo"


def test_mindrlhf_reward_model(tmp_path: Path) -> None:
    text = MINDRLHF.format(
        task="RewardModelDataset", kind="ChatGLM2Config", arch="Glm4RewardModel", more="alpha: 1.0, beta: 1.0, do_sample: True"
    )
    it = converted(written(tmp_path / "rm.yaml", text))
    config = loaded(it, tmp_path)
    assert (
        it.stage == "reward" and config.ranking.loss == "tokenwise" and warned(it, "beyond 2048 tokens") and warned(it, "PPO did not use")
    )


SCRIPT = """#!/bin/bash
EPOCHS=2
CUDA_VISIBLE_DEVICES=0 python ../src/{script} \\
    --do_train \\
    --dataset "a,b" --dataset_dir ../data \\
    --finetuning_type lora --lora_rank=4 --lora_dropout 0.1 \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --num_train_epochs $EPOCHS \\
    --learning_rate 1e-5 --max_source_length 100 --max_target_length 50 \\
    --plot_loss --fp16 {more}
"""


@pytest.mark.parametrize(("script", "stage"), [("train_sft.py", "sft"), ("train_rm.py", "reward"), ("train_policy_model.py", "ppo")])
def test_chatglm_commands(script: str, stage: str, tmp_path: Path) -> None:
    more = "--reward_model rm --checkpoint_dir lora1" if stage == "ppo" else ""
    it = converted(written(tmp_path / "run.sh", SCRIPT.format(script=script, more=more)))
    config = loaded(it, tmp_path)
    assert it.stage == stage and config.data.train == ("../data/a.json", "../data/b.json") and config.data.max_length == 150
    assert (config.run.epochs, config.optimizer.lr, config.optimizer.schedule) == (2, 1e-5, "linear") and config.model.adapter.rank == 4
    if stage == "ppo":
        ppo = config.ppo
        assert (ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon, ppo.clip) == (0.2, 6.0, 10000, 0.2)
        assert (config.rollout.prompts, config.sampling.max_new_tokens, config.reward.model) == (16, 50, "rm")
        for words in ("raw base model", "overwritten in every step", "pickle", "two answers", "merge the adapters"):
            assert warned(it, words), words
    else:
        assert config.batch.sequences == 16 and config.model.adapter.dropout == 0.1
        assert stage != "sft" or config.data.train_on == "last"
    assert warned(it, "dataset_info.json") and warned(it, "fp16") and not it.unknown


def test_chatglm_json_and_evaluation(tmp_path: Path) -> None:
    values = {
        "stage": "rm",
        "model_name_or_path": "m",
        "finetuning_type": "p_tuning",
        "pre_seq_len": 64,
        "dev_ratio": 0.1,
        "do_train": True,
    }
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(values))
    config = loaded(it := converted(path), tmp_path)
    assert it.stage == "reward" and (config.model.path, config.model.adapter.kind, config.model.adapter.tokens) == ("m", "ptuning", 64)
    assert config.data.eval_fraction == 0.1
    path.write_text(json.dumps(values | {"do_train": False, "do_predict": True, "finetuning_type": "freeze", "learning_rate": 1e-5}))
    it = converted(path)
    assert it.stage == "evaluate" and loaded(it, tmp_path).data.eval and warned(it, "freeze is not there")
    assert reasons(it)["learning_rate"] == "not used by `trueline evaluate`"


GLM4_FILE = """
seed: 42
run_mode: '{mode}'
output_dir: './output'
load_checkpoint: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
context: {{mode: 0, device_target: Ascend, enable_graph_kernel: False, max_call_depth: 10000, max_device_memory: 58GB,
  save_graphs: False, save_graphs_path: ./graph, device_id: 0, jit_config: {{jit_level: O1}}, memory_optimize_level: O0}}
remote_save_url: a bucket
model:
  model_config: {{type: ChatGLM2Config, batch_size: 1, num_layers: 20, padded_vocab_size: 151552, hidden_size: 4096, ffn_hidden_size: 13696,
    kv_channels: 128, num_attention_heads: 32, seq_length: 8192, hidden_dropout: 0.0, attention_dropout: 0.0, layernorm_epsilon: 1.5625e-07,
    rope_ratio: {ratio}, rmsnorm: True, use_rearrange_rope: True, apply_residual_connection_post_layernorm: False, post_layer_norm: True,
    add_bias_linear: False, add_qkv_bias: True, bias_dropout_fusion: True, multi_query_attention: True, multi_query_group_num: 2,
    apply_query_key_layer_scaling: True, attention_softmax_in_fp32: True, fp32_residual_connection: False, quantization_bit: 0,
    pre_seq_len: None, prefix_projection: False, compute_dtype: bfloat16, layernorm_compute_type: float32, param_init_type: {dtype},
    rotary_dtype: float32, use_past: {past}, use_flash_attention: True, block_size: 16, num_blocks: 4096,
    eos_token_id: [151329, 151336, 151338], pad_token_id: 151329, repetition_penalty: 1.0, max_decode_length: 4096,
    checkpoint_name_or_path: '', top_k: 1, top_p: 1, do_sample: False}}
  arch: {{type: ChatGLM2ForConditionalGeneration}}
trainer: {{type: CausalLanguageModelingTrainer, model_name: glm4_9b}}
do_eval: False
eval_step_interval: 500
eval_epoch_interval: -1
metric: {{type: ADGENMetric}}
processor: {{return_tensors: ms, type: GLMProcessor, tokenizer: {{type: ChatGLM4Tokenizer, eos_token: <eop>, vocab_file: tokenizer.model}}}}
train_dataset: &set
  data_loader: {{type: MindDataset, dataset_dir: '', shuffle: False}}
  input_columns: [input_ids, labels]
  num_parallel_workers: 8
  drop_remainder: True
train_dataset_task: {{type: CausalLanguageModelDataset, dataset_config: *set}}
runner_config: {{epochs: 5, batch_size: 1, gradient_accumulation_steps: 1, sink_mode: True, sink_size: 1}}
runner_wrapper: {{type: MFTrainOneStepCell, use_clip_grad: True}}
lr_schedule: {{type: CosineWithWarmUpLR, learning_rate: 1.e-6, lr_end: 1.e-6, warmup_ratio: 0, total_steps: -1}}
optimizer: {{type: AdamW, betas: [0.9, 0.999], eps: 1.e-8, learning_rate: 1.e-6, weight_decay: 0.01}}
use_parallel: True
parallel: {{parallel_mode: 1, gradients_mean: False, full_batch: True, enable_parallel_optimizer: True}}
parallel_config: {{data_parallel: 1, model_parallel: {mp}, pipeline_stage: 1, micro_batch_num: 64, vocab_emb_dp: False}}
micro_batch_interleave_num: 1
recompute_config: {{recompute: True, select_recompute: False, mp_comm_recompute: True}}
callbacks:
  - {{type: MFLossMonitor}}
  - {{type: CheckpointMonitor, prefix: glm4, save_checkpoint_steps: 1000, keep_checkpoint_max: 1, integrated_save: False}}
eval_callbacks: [{{type: ObsMonitor, keep_last: False}}]
"""
LAUNCH = ["predict.yaml"] * 3 + ["finetune.yaml"] * 3 + ["ppo.mindrecord", "cvalues.mindrecord", "False", "./ckpt"]
LATER = ["4", "True", "./old", "rm_ckpt", "cm_ckpt", "ref_ckpt"]


def glm4_files(folder: Path) -> None:
    written(folder / "predict.yaml", GLM4_FILE.format(mode="predict", ratio=500, dtype="bfloat16", past=True, mp=2))
    written(folder / "finetune.yaml", GLM4_FILE.format(mode="finetune", ratio=1, dtype="float32", past=False, mp=4))


@pytest.mark.parametrize("cache", [["False"], []])
def test_mindrlhf_launch(cache: list[str], tmp_path: Path) -> None:
    """All 17 arguments, and the 16 of the published example, mean the same; the model files they name are read with all their keys."""
    glm4_files(tmp_path)
    lines = " \\\n  ".join(["bash examples/run_glm4_rlhf.sh", *LAUNCH, *cache, *LATER])
    command = written(tmp_path / "launch.sh", f"#!/bin/bash\ncd mindrlhf\n{lines} \\\n\n\n")
    notes: list[str] = []
    given, _ = read_old([str(command)], notes)
    assert {name: olds[-1].value for name, olds in given.items() if "/launch.sh:" in olds[-1].where} == {
        "G_SFT_PATH": "predict.yaml", "G_RM_PATH": "predict.yaml", "G_CRITIC_PATH": "predict.yaml", "T_SFT_PATH": "finetune.yaml",
        "T_RM_PATH": "finetune.yaml", "T_CRITIC_PATH": "finetune.yaml", "save_data_file": "ppo.mindrecord",
        "mind_dataset_dir": "cvalues.mindrecord", "save_ckpt_dir": "./ckpt", "worker_num": 4,
        "load_sft_checkpoint": "./old", "load_rm_checkpoint": "rm_ckpt", "load_critic_checkpoint": "cm_ckpt",
        "load_ref_checkpoint": "ref_ckpt",
        **({"enable_compile_cache": False} if cache else {}),
    }  # fmt: skip
    assert any("argument 11 of run_glm4_rlhf.sh is COMPILE_CACHE" in note for note in notes) == (not cache)
    it = converted(command)
    config = loaded(it, tmp_path)
    assert it.stage == "ppo" and config.model.path == "THUDM/glm-4-9b-chat-hf" and config.data.max_length == 8192
    assert config.data.train == config.data.ptx == ("cvalues.mindrecord",) and str(config.run.output) == "ckpt"
    assert (config.sampling.max_new_tokens, config.run.save_every, config.reward.model) == (4096, 1000, "runs/reward/model")
    assert warned(it, "rope_ratio is 500") and warned(it, "num_layers 20") and warned(it, "also a stop token") and not it.unknown
    assert "convert" in reasons(it)["load_sft_checkpoint"] and reasons(it)["worker_num"].startswith("how MindSpore ran")


def test_mindrlhf_launch_that_is_not_whole(tmp_path: Path) -> None:
    """Too few arguments and model files that are not there are said; the halves' scripts are read, and the script itself with its body."""
    notes: list[str] = []
    few = written(tmp_path / "few.sh", "bash run_glm4_rlhf.sh a.yaml b.yaml c.yaml d.yaml\n")
    read_old([str(few)], notes)
    assert "has 4 arguments, expected at least 8" in notes[0] and "G_SFT_PATH a.yaml is not here" in notes[1]
    half = "bash run_glm4_train.sh t.yaml r.yaml c.yaml exp.mindrecord False ./ False 8 True ckpt None cm None x\n"
    it = converted(written(tmp_path / "half.sh", half))
    assert it.stage == "ppo" and [old.name for old in it.unknown] == ["run_glm4_train.sh[14]"]
    assert "run.output" in reasons(it)["save_ckpt_dir"] and str(loaded(it, tmp_path).run.output) == "runs/ppo"
    body = "SFT_PATH=$1\nRM_PATH=$2\nONLY=${3:-False}\nCKPT=${4:-'./kept'}\nDATA=d.mindrecord\nepoch=0\nwhile [ $epoch -lt 10 ]; do\n"
    body += '  msrun --worker_num=2 --local_worker_num=2 --master_addr=127.0.0.1 --master_port=10969 --join=True --log_dir=./log \\\n'
    body += '    "$here"/run_glm4_generate.py --sft_path "$SFT_PATH" --reward_path "$RM_PATH" --only_save_strategy "$ONLY" \\\n'
    body += '    --mind_dataset_dir "$DATA" --save_ckpt_dir "$CKPT" --enable_compile_cache False\ndone\n'
    it = converted(written(tmp_path / "run.sh", body))
    config = loaded(it, tmp_path)
    assert config.data.train == ("d.mindrecord",) and str(config.run.output) == "kept" and not it.unknown
    assert "glm-4" in config.model.path


REGISTRY: dict[str, Any] = {
    "alpaca_en": {"hf_hub_url": "someone/alpaca"},
    "alpaca_zh": {"file_name": "alpaca_51k.json", "file_sha1": "e655af3d"},
    "belle_0.5m": {"hf_hub_url": "someone/half-a-million"},
    "firefly": {"hf_hub_url": "someone/firefly", "columns": {"prompt": "input", "query": "", "response": "target", "history": ""}},
    "example": {
        "script_url": "example_dataset",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    },
    "mine": {"file_name": "/data/mine.json", "columns": {"prompt": "question", "query": "", "response": "answer", "history": ""}},
    "comparison_zh": {"file_name": "comparison.json", "file_sha1": "b99a41c1"},
}
ARGUMENTS = """python ../src/train_sft.py --do_train --model_name_or_path THUDM/chatglm-6b --split train \\
  --dataset {names} --dataset_dir {folder} \\
  --max_samples 5000 --source_prefix x --num_beams 4 --max_source_length 256 --max_target_length 200 --ignore_pad_token_for_loss False \\
  --finetuning_type lora --lora_rank 8 --lora_alpha 32.0 --lora_dropout 0.1 --lora_target query_key_value --pre_seq_len 16 \\
  --prefix_projection False --num_layer_trainable 3 --name_module_trainable mlp --quantization_bit 8 --resume_lora_training False \\
  --checkpoint_dir first,second --use_fast_tokenizer --overwrite_cache --output_dir out --overwrite_output_dir --plot_loss \\
  --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 \\
  --learning_rate 5e-5 --num_train_epochs 1.0 --fp16
"""


def test_chatglm_registry(tmp_path: Path) -> None:
    """The files, hubs, programs and columns of the registry beside the data; every key of every data set is accounted for."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(REGISTRY, indent=2))
    names = "alpaca_zh,belle_0.5m,firefly,example,mine,other"
    it = converted(written(tmp_path / "run.sh", ARGUMENTS.format(names=names, folder="data")))
    config = loaded(it, tmp_path)
    assert config.data.train == (
        "data/alpaca_51k.json", "data/belle_0.5m.json", "data/firefly.json", "data/example.json", "/data/mine.json", "data/other.json",
    )  # fmt: skip
    assert warned(it, "belle_0.5m is the hub's someone/half-a-million") and warned(it, "made by the program in example_dataset")
    assert warned(it, "in data/firefly.json rename input to instruction, target to output")
    assert not warned(it, "mine has columns") and not warned(it, "example has columns")  # question and answer are known as they are
    assert warned(it, "dataset_info.json has no other, which is taken for data/other.json")
    assert reasons(it)["comparison_zh.file_name"] == "a data set that this run does not use" and not it.unknown
    assert "hash" in reasons(it)["alpaca_zh.file_sha1"]
    alone = tmp_path / "data" / "dataset_info.json"
    with pytest.raises(UserError, match="a registry of data sets alone"):
        converted(alone)
    beside = converted(written(tmp_path / "run.sh", ARGUMENTS.format(names="mine", folder="elsewhere")), alone)
    assert loaded(beside, tmp_path).data.train == ("/data/mine.json",)
    lost = converted(written(tmp_path / "run.sh", ARGUMENTS.format(names="mine", folder="elsewhere")))
    assert loaded(lost, tmp_path).data.train == ("elsewhere/mine.json",) and warned(lost, "is not here to look up mine")


def test_projections() -> None:
    assert projections(["query_key_value", "dense"]) == ["q", "k", "v", "o"]
    assert projections("v_proj, q_proj") == ["q", "v"] and projections("dense_h_to_4h") == ["gate", "up"]
    with pytest.raises(UserError, match="LoRA on wte: no such projection, known are query_key_value"):
        projections(["wte"])


def test_the_command(trueline: Commands, tmp_path: Path) -> None:
    old = written(tmp_path / "lora.yaml", DEMO)
    printed = trueline("import", old).ok().out
    assert (
        "trueline sft sft.yaml" in printed and "model:\n  path: THUDM/glm-4-9b-chat-hf" in printed and not (tmp_path / "sft.yaml").exists()
    )
    new = tmp_path / "new.yaml"
    account = trueline("import", old, "--out", new, "--model", "my-model", "--devices", 2).ok().out
    assert "data.max_length = 1012" in account and f"trueline sft {new}" in account
    config = load_config(STAGES["sft"], [new])
    assert config.model.path == "my-model" and config.batch.sequences == 16  # type: ignore[attr-defined]
    assert "is already there" in trueline("import", old, "--out", new).refused()
    assert "none of the configurations known here" in trueline("import", written(tmp_path / "x.yaml", "a: 1")).refused()
    assert "cannot be read as text" in trueline("import", tmp_path / "none.sh").refused()
    assert "a quote that does not end" in trueline("import", written(tmp_path / "q.sh", "python train_sft.py --dataset 'a\n")).refused()
