"""`trueline plan`: memory, disk and time of a run before it is started. One rule: whatever can be asked is asked, not worked out again.

The data are read as the run reads them, its micro-batches are made by the same plans, and its step is run on tensors without numbers.
Calibration runs the fullest micro-batch for real. No run folder is made, and nothing is left behind.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trueline.config.schema import AdapterConfig, DpoStageConfig, PpoStageConfig, RewardConfig, StageConfig
from trueline.data.cache import lengths
from trueline.data.sample import answered
from trueline.data.stream import plan, step_indices, total_samples, total_steps
from trueline.data.tokenizer import Tokenizer
from trueline.families.folder import ModelFolder, hollow_decoder, materialise, open_folder, resolve
from trueline.families.peft import is_adapter
from trueline.model.adapters import add_adapter, trainable
from trueline.model.batch import pack, pack_pairs
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel, Scorer
from trueline.parallel.memory import free_memory
from trueline.parallel.world import find_device
from trueline.recipes.actors import longest_rollouts
from trueline.recipes.assemble import DTYPES, base_folder, files_fingerprint, open_text, settle_dtype
from trueline.recipes.calibrate import NEW_TOKENS, calibrate_fit, calibrate_ppo, first_tokens
from trueline.recipes.prepare import Prepared, preference_pairs, prompt_tokens, sft_samples, with_shared_prompts
from trueline.rollout.engine import PROMPT_TOKENS
from trueline.rollout.fused import may_merge, merged_bytes
from trueline.rollout.native import lacks_compiler
from trueline.rollout.packed import PAYS, PackedDecoder, can_pack, copied_bytes
from trueline.train.budget import SPARE, choose_recompute
from trueline.train.memory_plan import Peak, disk_bytes, fullest_of, highest, key_value_bytes, times
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.rehearsal import fake_batch, outside, rehearse_pass, rehearse_step, shapes_only, weight_bytes

LOOKED_AT = 512  # steps whose micro-batches are planned, evenly over the run
SLOW_ANSWERS = "generate: there is no C compiler; with one (cc) this CPU would make answers faster, and without copies of all weights"
LINE, SAMPLE = 400, 6  # bytes of a step in metrics.jsonl, and of a token in samples.jsonl, about


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `fixed` is there all the time; the phases are what is there at the most of each kind of work."""

    phases: dict[str, Peak]
    roles: dict[str, int]  # bytes of weights each role has to itself
    recompute: dict[str, int]
    said: list[str]
    work: dict[str, Any]
    disk: dict[str, int]
    calibrate: Callable[[], tuple[dict[str, Peak], float]]  # phases as measured, and the seconds of the whole run


def run(stage: str, config: Any, calibrate: bool, as_json: bool) -> None:
    """Prints the plan as a table, or as one JSON object."""
    device, program = find_device(), _resident()
    free = {"memory": free_memory(device), "disk": _free_disk(config.run.output)}
    config = settle_dtype(config)
    ppo = isinstance(config, PpoStageConfig)
    forecast = ppo_forecast(config, device, free["memory"]) if ppo else fit_forecast(stage, config, device, free["memory"])
    phases, seconds, notes = forecast.phases, None, list(forecast.said)
    if calibrate and highest(phases)[1].total < free["memory"]:
        phases, seconds = forecast.calibrate()
    elif calibrate:
        notes.append("not calibrated: the run does not fit this device")
    name, peak = highest(phases)
    found: dict[str, Any] = {"stage": stage, "device": str(device), "calibrated": seconds is not None, "phase": name}
    found |= {"peak": asdict(peak) | {"total": peak.total}, "phases": {n: asdict(p) | {"total": p.total} for n, p in phases.items()}}
    found |= {"roles": forecast.roles, "recompute": forecast.recompute, "program": program if device.type == "cpu" else 0}
    found |= {"disk": forecast.disk, "work": forecast.work, "seconds": seconds, "free": free, "notes": notes}
    found["warnings"] = warnings(found, config)
    print(json.dumps(found) if as_json else table(found))


def fit_forecast(stage: str, config: StageConfig, device: torch.device, free: int) -> Forecast:
    """SFT, reward or DPO: the fullest micro-batch of the run's own plans, on the model without numbers."""
    folder, (family, tokenizer), dtype = base_folder(config.model), open_text(config.model), _dtype(config, device)
    data, batch, seed = config.data.model_copy(update={"cache": "off"}), config.batch, config.run.seed
    prepared: Prepared[Any] = (sft_samples if stage == "sft" else preference_pairs)(data, family, tokenizer, seed)
    if isinstance(config, DpoStageConfig | RewardConfig):
        wanted = (config.dpo if isinstance(config, DpoStageConfig) else config.ranking).share_prefix
        prepared = with_shared_prompts(prepared, wanted)
    items, sizes = prepared.train, lengths(prepared.train)
    total = total_steps(len(items), batch.sequences, config.run.steps, config.run.epochs)
    plan([int(sizes.max())], batch.max_tokens)  # refuses what would not fit later
    limit = None if config.run.epochs is None else total_samples(len(items), config.run.epochs)
    plans = []
    for step in sorted({total * n // LOOKED_AT for n in range(LOOKED_AT)}):
        chosen = step_indices(seed, step, len(items), batch.sequences, limit)
        plans.append([[chosen[i] for i in part] for part in plan(sizes[chosen].tolist(), batch.max_tokens)[0]])
    fullest, micro_batches = fullest_of(plans, sizes.tolist())
    groups = [[items[i] for i in part] for part in fullest]
    packed = [(pack if stage == "sft" else pack_pairs)(group) for group in groups]
    counts = [int(batch.trained.sum()) for batch in packed]
    with shapes_only(dtype) as mode:
        decoder = _decoder(folder, {"policy": config.model.adapter}, dtype, device, with_head=stage != "reward")
        role, parameters = _trained(decoder, "policy", config.model.adapter)
        module, parameters = (LanguageModel(decoder, role), parameters) if stage != "reward" else _scorer(decoder, role, parameters)
        optimizer, inside = make_optimizer(parameters, config.optimizer), [fake_batch(batch, mode, device) for batch in packed]
        fixed = Peak(weights=weight_bytes(module), states=optimizer.memory()[1])
        said = _recompute(config, {"model": (module, inside[0])}, [optimizer], free, fixed.weights, len(packed) > 1)
        step_peak = fixed + rehearse_step(module, optimizer, list(zip(inside, counts, strict=True)), stage == "sft")
        phases = {"step": step_peak}
        reference = config.reference.path if isinstance(config, DpoStageConfig) and config.reference.kind == "frozen" else None
        roles = {"policy": fixed.weights}
        if isinstance(module, LanguageModel) and isinstance(config, DpoStageConfig) and config.reference.kind != "stored":
            roles |= {"reference": _folder_bytes(open_folder(resolve(reference)), dtype)} if reference else {}
            added = rehearse_pass(module, inside[0], counts[0])
            phases["reference"] = added + Peak(weights=sum(roles.values()), states=sum(x.nbytes for x in optimizer.state().values()))
    passes = min(total * batch.sequences / len(items), config.run.epochs or float("inf"))
    read = int(lengths(prepared.held_out).sum()) * times(config.run.eval_every, total)
    if isinstance(config, DpoStageConfig) and config.reference.kind != "stored":
        read += sum(int(lengths(part).sum()) for part in (items, prepared.held_out))
    tokens, full = round(int(sizes.sum()) * passes), [sum(int(sizes[i]) for i in part) for part in fullest]
    work: dict[str, float] = {"records": len(items), "steps": total, "tokens": tokens, "tokens only read": read}
    work |= {"micro-batches per step": round(micro_batches, 2)}
    work |= {"fullest micro-batch": full[0], "parameters trained": sum(p.numel() for p in parameters.values())}
    trained = sum(p.numel() * p.element_size() for p in parameters.values())
    published = _published(config, phases, fixed, fixed.weights, trained, folder, dtype)
    disk = _disk(config, total, trained + fixed.states, published, prepared, tokenizer, total * LINE)

    def measured() -> tuple[dict[str, Peak], float]:
        step, reading = calibrate_fit(config, groups, decoder.recompute, read > 0)
        seconds = (step.seconds * tokens + reading * read) / sum(full)
        return phases | {"step": step_peak.scaled(fixed.total + step.added)}, seconds

    return Forecast(phases, roles, {"model": decoder.recompute}, said, work, disk, measured)


def ppo_forecast(config: PpoStageConfig, device: torch.device, free: int) -> Forecast:
    """PPO, as if all prompts of an iteration were the longest and no answer stopped."""
    folder, (family, tokenizer), dtype = base_folder(config.model), open_text(config.model), _dtype(config, device)
    data, new, seed = config.data.model_copy(update={"cache": "off"}), config.sampling.max_new_tokens, config.run.seed
    prompts = prompt_tokens(data, family, tokenizer, new, seed)
    total = total_steps(len(prompts.train), config.rollout.prompts, config.run.steps, config.run.epochs)
    rollouts = longest_rollouts(config, prompts.train)
    sizes, per_update = [len(r.prompt) + new for r in rollouts], -(-len(rollouts) // config.ppo.minibatches)
    plan(sizes[:1], config.batch.max_tokens)
    blocks = folder.decoder_config.blocks
    scored, learned = (plan(part, config.batch.max_tokens)[0] for part in (sizes, sizes[:per_update]))
    reading = rollouts[: max(1, PROMPT_TOKENS // len(rollouts[0].prompt))][: config.rollout.running]
    packed = [pack([answered(rollouts[i].prompt, rollouts[i].tokens, blocks) for i in part]) for part in (scored[0], *learned[:2])]
    packed.append(pack([answered(r.prompt[:-1], r.prompt[-1:], blocks) for r in reading]))
    counts = [int(batch.trained.sum()) for batch in packed]
    likeness = replace(folder.decoder_config, num_layers=0, vocab_size=8, hidden_size=8)
    packs = config.rollout.packed and new >= PAYS and can_pack(Decoder(likeness).to(dtype)) and device.type == "cpu"
    with shapes_only(dtype) as mode:
        model, critic, optimizers = _actor_and_critic(config, folder, dtype, device)
        decoder, trunk, bare = model.decoder, critic.decoder, weight_bytes(model)
        roles = {"policy": bare, "critic": weight_bytes(model, critic) - bare, **_frozen_roles(config, dtype, folder)}
        fixed = Peak(weights=sum(roles.values()), states=sum(optimizer.memory()[1] for optimizer in optimizers))
        scoring, *learning, read = (fake_batch(batch, mode, device) for batch in packed)
        steps, several = list(zip(learning, counts[1:-1], strict=True)), len(learning) > 1 or config.ppo.ptx_coefficient > 0
        modules = {"policy": (model, learning[0]), "critic": (critic, learning[0])}
        said = _recompute(config, modules, optimizers, free, fixed.weights, several)
        said += [SLOW_ANSWERS] if packs and dtype == torch.float32 and lacks_compiler() else []
        generating = _generating(config, model, sizes[0] - new, len(rollouts), packs, free - fixed.total)
        added = {
            "generate": generating + rehearse_pass(model, read, 1),
            "score": max((rehearse_pass(m, scoring, counts[0]) for m in (model, critic)), key=lambda peak: peak.total),
            "policy update": rehearse_step(model, optimizers[0], steps, True),
            "critic update": rehearse_step(critic, optimizers[1], steps),
        }
    phases = {name: fixed + peak for name, peak in added.items()}
    tokens, answers = round((float(lengths(prompts.train).mean()) + new) * len(rollouts) * total), len(rollouts)
    work = {"prompts": len(prompts.train), "steps": total, "answers": answers * total, "tokens": tokens}
    work |= {"micro-batches per update": len(learned), "fullest micro-batch": sum(sizes[i] for i in scored[0])}
    work["parameters trained"] = sum(p.numel() for optimizer in optimizers for p in optimizer.parameters.values())
    policy, both = (sum(p.numel() * p.element_size() for o in some for p in o.parameters.values()) for some in (optimizers[:1], optimizers))
    published = _published(config, phases, fixed, bare, policy, folder, dtype)
    disk = _disk(config, total, both + fixed.states, published, prompts, tokenizer, total * LINE + tokens * SAMPLE)

    def measured() -> tuple[dict[str, Peak], float]:
        found = calibrate_ppo(config, rollouts, {"policy": decoder.recompute, "critic": trunk.recompute})
        update = max(("policy update", "critic update"), key=lambda name: phases[name].total)
        seen = {update: phases[update].scaled(fixed.total + found["update"].added)}
        seen["score"] = phases["score"].scaled(fixed.total + found["score"].added)
        waves = total * -(-answers // config.rollout.running)
        waves += times(config.run.eval_every, total) * -(-len(prompts.held_out) // config.rollout.running)
        token = (found["generate"].seconds - found["read"].seconds) / NEW_TOKENS
        answering = waves * (found["read"].seconds + token * (new - first_tokens(config)))
        per_token = found["score"].seconds / sum(sizes[i] for i in scored[0])
        per_token += config.ppo.epochs * found["update"].seconds / sum(sizes[i] for i in learned[0])
        return phases | seen, answering + tokens * per_token

    return Forecast(phases, roles, {"policy": decoder.recompute, "critic": trunk.recompute}, said, work, disk, measured)


def _actor_and_critic(
    config: PpoStageConfig, folder: ModelFolder, dtype: torch.dtype, device: torch.device
) -> tuple[LanguageModel, Scorer, list[Optimizer]]:
    """On one trunk where recipes/roles.py shares it."""
    adapter, wanted = config.model.adapter, config.critic.adapter or config.model.adapter
    own = config.critic.path is not None or "full" in (wanted.kind, adapter.kind)
    trunk = decoder = _decoder(folder, {"policy": adapter} | ({} if own else {"critic": wanted}), dtype, device)
    if own:
        home = base_folder(config.model.model_copy(update={"path": config.critic.path, "base": None})) if config.critic.path else folder
        trunk = _decoder(home, {"critic": wanted}, dtype, device, with_head=False)
    role, parameters = _trained(decoder, "policy", adapter)
    critic_role, critic_parameters = _trained(trunk, "critic", wanted)
    critic, critic_parameters = _scorer(trunk, critic_role, critic_parameters)
    for parameter in parameters.values():  # the critic's role has frozen it
        parameter.requires_grad_(True)
    settings = (config.optimizer, config.critic.optimizer or config.optimizer)
    optimizers = [make_optimizer(p, s) for p, s in zip((parameters, critic_parameters), settings, strict=True)]
    return LanguageModel(decoder, role), critic, optimizers


def _published(
    config: StageConfig, phases: dict[str, Peak], fixed: Peak, bare: int, trained: int, folder: ModelFolder, dtype: torch.dtype
) -> int:
    """Bytes of the finished model. Random weights under an adapter are drawn again and written beside it, which is a phase of its own:
    the largest of them is there in float32 too as it is drawn, and once more as it is written."""
    if config.model.adapter.kind == "full":
        return bare
    if config.model.init == "load":
        return trained
    again, sizes = _folder_bytes(folder, dtype), folder.decoder_config
    phases["publish"] = fixed + Peak(weights=again, activations=sizes.vocab_size * sizes.hidden_size * (4 + dtype.itemsize))
    return trained + again


def _decoder(
    folder: ModelFolder, adapters: Mapping[str, AdapterConfig], dtype: torch.dtype, device: torch.device, with_head: bool = True
) -> Decoder:
    """A decoder with its roles' adapters; they come before the memory, as `add_adapter` asks."""
    with outside():
        decoder = hollow_decoder(folder, with_head)
        for role, adapter in adapters.items():
            add_adapter(decoder, role, adapter, 0)
    materialise(decoder, dtype, device)
    return decoder


def _trained(decoder: Decoder, role: str, adapter: AdapterConfig) -> tuple[str | None, dict[str, nn.Parameter]]:
    """The role that is run (None: the bare weights), and what of it is trained."""
    speaks = None if adapter.kind == "full" else role
    return speaks, trainable(decoder, speaks, adapter.kind)


def _scorer(decoder: Decoder, role: str | None, parameters: dict[str, nn.Parameter]) -> tuple[Scorer, dict[str, nn.Parameter]]:
    scorer = Scorer(decoder, role)
    return scorer, parameters | {"score.weight": scorer.score.get_parameter("weight")}


def _recompute(
    config: StageConfig, modules: dict[str, Any], optimizers: Sequence[Any], free: int, weights: int, several: bool
) -> list[str]:
    """Sets each decoder's layers as the run will."""
    said = []
    for name, (module, batch) in modules.items():
        if config.model.recompute == "auto":
            memory = config.batch.memory or max(int(free * (1 - SPARE)) - weights, 1)
            tokens = len(batch.inputs)
            said.append(f"{name}: {choose_recompute(module.decoder, module.role, batch, tokens, optimizers, memory, several)}")
        elif config.model.recompute:
            module.decoder.recompute = len(module.decoder.layers)
    return said


def _frozen_roles(config: PpoStageConfig, dtype: torch.dtype, folder: ModelFolder) -> dict[str, int]:
    """Weights of the roles that are not trained, where they have their own (recipes/roles.py shares the rest)."""
    found, full = {}, config.model.adapter.kind == "full"
    if config.reference.kind == "frozen" and config.reference.path is not None:
        other = config.model.model_copy(update={"path": config.reference.path, "base": None})
        found["reference"] = _folder_bytes(base_folder(other), dtype)
    elif full:
        found["reference"] = _folder_bytes(folder, dtype)
    if config.reward.model is not None:
        path = resolve(config.reward.model)
        home = base_folder(config.model.model_copy(update={"path": config.reward.model, "base": None, "template": "auto"}))
        shared = not full and is_adapter(path) and files_fingerprint(home.path) == files_fingerprint(folder.path)
        found["reward"] = 0 if shared else _folder_bytes(home, dtype, with_head=False)
    return found


def _generating(config: PpoStageConfig, model: LanguageModel, prompt: int, answers: int, packs: bool, free: int) -> Peak:
    """Keys and values of the running answers, their logits and probabilities, and the packed or merged weights that answers are made with.

    More than the memory there is for keys and values they never take: the engine then has pages, and answers wait.
    """
    decoder, new = model.decoder, config.sampling.max_new_tokens
    sizes, rows, weight = decoder.config, min(config.rollout.running, answers), decoder.embed.weight
    width = PackedDecoder.stored.itemsize if packs else weight.element_size()
    stored = key_value_bytes(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, width, rows, prompt, prompt + new)
    copies = 0
    if packs:
        copies = copied_bytes(decoder, model.role)
    elif config.rollout.packed and weight.device.type != "cpu" and may_merge(merged := merged_bytes(decoder, model.role), new, free):
        copies = merged
    room = config.rollout.memory_bytes
    room = (free - copies) // 2 if room is None else room
    return Peak(weights=copies, keys_values=max(min(stored, room), 0), logits=3 * rows * sizes.vocab_size * 4)


def _folder_bytes(folder: ModelFolder, dtype: torch.dtype, with_head: bool = True) -> int:
    return sum(p.numel() for p in hollow_decoder(folder, with_head).parameters()) * dtype.itemsize


def _dtype(config: StageConfig, device: torch.device) -> torch.dtype:
    """As `open_model` reads it."""
    return DTYPES.get(config.model.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)


def _disk(
    config: StageConfig, total: int, checkpoint: int, model: int, prepared: Prepared[Any], tokenizer: Tokenizer, logs: int
) -> dict[str, int]:
    kept = [] if config.data.cache == "off" else [block.batch.nbytes for file in prepared.files.values() for block in file.blocks]
    files = sum(path.stat().st_size for path in tokenizer.files.values())
    return disk_bytes(checkpoint, total, config.run.save_every, config.run.keep, model + files, sum(kept), logs)


def _free_disk(folder: Path) -> int:
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def _resident() -> int:
    """Bytes of this process before it has opened anything: Python, torch and what they load."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def warnings(found: Mapping[str, Any], config: StageConfig) -> list[str]:
    """What does not fit, and the key to change."""
    said, needed, free = [], found["peak"]["total"], found["free"]
    if needed > free["memory"]:
        keys = ["batch.max_tokens (lower)"] if found["phase"] != "generate" else ["rollout.running (lower)"]
        keys += ["model.recompute=true"] if config.model.recompute is False else []
        keys += ["model.adapter.kind=lora"] if config.model.adapter.kind == "full" else []
        keys += ["optimizer.states=bfloat16"] if found["peak"]["states"] > needed / 3 and config.optimizer.states == "float32" else []
        left = f"{_size(free['memory'])} that are free on {found['device']}"
        said.append(f"memory: {_size(needed)} do not fit {left}; change {', '.join(keys)}")
    if found["disk"]["most"] > free["disk"]:
        most = _size(found["disk"]["most"])
        said.append(f"disk: {most} do not fit {_size(free['disk'])} that are free; lower run.keep, or set run.output to another disk")
    return said


def table(found: Mapping[str, Any]) -> str:
    """The plan for people."""
    names = list(found["phases"])
    columns = ["memory at the most, in", *names]
    rows = [[field.replace("_", "/"), *(_size(found["phases"][name][field]) for name in names)] for field in found["peak"]]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = []
    for name, *cells in [columns, *rows]:
        lines.append("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]))
    peak, free = found["peak"]["total"], found["free"]
    beside = f", and {_size(found['program'])} for the program" if found["program"] else ""
    lines += ["", f"peak     {_size(peak)} on {found['device']} ({found['phase']}){beside}; free {_size(free['memory'])}"]
    lines += [f"weights  {', '.join(f'{role} {_size(size)}' for role, size in found['roles'].items())}"]
    disk = found["disk"]
    parts = ", ".join(f"{name} {_size(disk[name])}" for name in ("checkpoints", "model", "cache", "logs"))
    lines += [f"disk     {_size(disk['most'])} at the most, {_size(disk['kept'])} in the end ({parts}); free {_size(free['disk'])}"]
    lines += [f"work     {', '.join(f'{name} {value:,}' for name, value in found['work'].items())}"]
    seconds = found["seconds"]
    lines += [f"time     {'not known without calibration' if seconds is None else _duration(seconds)}"]
    return "\n".join([*lines, *found["notes"], *(f"warning: {line}" for line in found["warnings"])])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {minutes} min {rest} s"
