"""PPO's four models in as little memory as they allow. One rule: a trunk that stays frozen is held once, whoever runs on it.

With adapters, policy, reference, critic and a reward model trained on the same base are four roles of one decoder. When all weights are
trained, each of them is a copy of its own.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from trueline.config.schema import PpoStageConfig
from trueline.errors import UserError
from trueline.families.folder import resolve
from trueline.families.peft import Base, adapter_base, adapter_score, is_adapter, load_adapter
from trueline.model.adapters import adapter_parameters, copy_adapter, has_adapter, merge_adapter, remove_adapter
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel, Scorer
from trueline.recipes.assemble import FOUND, Opened, files_fingerprint, forget_found, make_scorer, open_model, speaking, train_role
from trueline.recipes.generate import language_model_of
from trueline.recipes.judges import frozen_config, needed_score, reward_model


@dataclass(frozen=True)
class Roles:
    """Who takes part in PPO."""

    policy: Opened
    model: LanguageModel
    policy_parameters: dict[str, nn.Parameter]
    reference: LanguageModel
    critic: Scorer
    critic_parameters: dict[str, nn.Parameter]
    reward: Scorer | None  # None: a Python function
    reward_opened: Opened | None  # the reward model's own folder; None when it shares the policy's

    @property
    def trunks(self) -> int:
        """How many decoders are held in memory."""
        decoders = [self.model.decoder, self.reference.decoder, self.critic.decoder, *([self.reward.decoder] if self.reward else [])]
        return len({id(decoder) for decoder in decoders})


def parents(config: PpoStageConfig, policy: Opened) -> dict[str, str]:
    """What the run starts from: path -> fingerprint."""
    others = [resolve(path) for path in (config.reward.model, config.critic.path, config.reference.path) if path is not None]
    return {str(policy.path): policy.fingerprint} | {str(path): files_fingerprint(path) or "random" for path in others}


def open_roles(config: PpoStageConfig) -> Roles:
    """Opens every model the config names, shares what can be shared, and freezes all but the policy and the critic."""
    seed, wanted = config.run.seed, config.model.adapter
    policy = speaking(open_model(config.model, seed))
    role, parameters = train_role(policy, wanted, "policy", seed)
    model = LanguageModel(policy.decoder, role)
    reference = _reference(config, policy, role)
    critic, critic_parameters = _critic(config, policy)
    reward, reward_opened = _reward(config, policy)
    forget_found(policy)
    for parameter in parameters.values():  # a role that came later has frozen it
        parameter.requires_grad_(True)
    for module in (model, reference, critic, *([reward] if reward else [])):
        module.eval()  # no dropout: the ratio of the first update must be one
    return Roles(policy, model, parameters, reference, critic, critic_parameters, reward, reward_opened)


def _reference(config: PpoStageConfig, policy: Opened, role: str | None) -> LanguageModel:
    """The policy as training starts, or what `config.reference` names.

    A fresh LoRA has no effect, so the bare trunk is the start. A loaded adapter or a P-tuning prefix does have one: the reference keeps a
    copy.
    """
    kind, path = config.reference.kind, config.reference.path
    if kind == "adapters_off" and role is None:
        raise UserError("reference.kind: adapters_off needs model.adapter.kind lora or ptuning; full has no adapter to switch off")
    if kind == "frozen" and path is not None:
        return language_model_of(open_model(frozen_config(config.model, path), config.run.seed))
    if role is None:
        return LanguageModel(copy.deepcopy(policy.decoder)).requires_grad_(False)
    if kind == "adapters_off" or (policy.adapter is None and role not in policy.decoder.prefixes):
        return LanguageModel(policy.decoder, None)
    copy_adapter(policy.decoder, role, "reference")
    return LanguageModel(policy.decoder, "reference")


def _critic(config: PpoStageConfig, policy: Opened) -> tuple[Scorer, dict[str, nn.Parameter]]:
    wanted = config.critic.adapter or config.model.adapter
    section = "critic.adapter" if config.critic.adapter else "model.adapter"
    if config.critic.path is not None:
        trained = {name: getattr(config.model, name) for name in ("recompute", "compile")}
        settings = frozen_config(config.model, config.critic.path).model_copy(update=trained)
        own = open_model(settings, config.run.seed, with_head=False)
        role, parameters = train_role(own, wanted, "critic", config.run.seed, section)
        forget_found(own)
        scorer = make_scorer(own.decoder, role, own.score)
    elif wanted.kind == "full" or config.model.adapter.kind == "full":
        trunk = _copied_trunk(policy)
        role, parameters = train_role(_with_decoder(policy, trunk), wanted, "critic", config.run.seed, section)
        scorer = make_scorer(trunk, role, None)
    else:
        role, parameters = train_role(policy, wanted, "critic", config.run.seed, section)
        scorer = make_scorer(policy.decoder, role, None)
    parameters["score.weight"] = scorer.score.get_parameter("weight")
    return scorer, parameters


def _copied_trunk(policy: Opened) -> Decoder:
    """A copy of the policy's trunk without its vocabulary head: the policy as it was found, LoRA merged."""
    trunk = copy.deepcopy(policy.decoder)
    trunk.head = None
    for role in ("policy", "reference"):
        remove_adapter(trunk, role)
    if policy.adapter is not None and policy.adapter.kind == "lora" and has_adapter(trunk, FOUND):  # a full policy has merged it already
        merge_adapter(trunk, FOUND)
    remove_adapter(trunk, FOUND)
    return trunk


def _with_decoder(policy: Opened, trunk: Decoder) -> Opened:
    return Opened(policy.path, policy.folder, policy.name, policy.tokenizer, trunk, None, None, policy.drawn)


def _reward(config: PpoStageConfig, policy: Opened) -> tuple[Scorer | None, Opened | None]:
    """The reward model: one more role of the policy's trunk where it is an adapter on the same, frozen base."""
    if config.reward.model is None:
        return None, None
    path = resolve(config.reward.model)
    if config.model.adapter.kind != "full" and is_adapter(path) and _same_base(path, policy):
        base = Base(policy.folder.family, policy.name, files_fingerprint(policy.folder.path))
        load_adapter(path, policy.decoder, "reward", base)
        score = adapter_score(path, policy.folder.decoder_config.hidden_size)
        scorer = make_scorer(policy.decoder, "reward", needed_score(score, path))
        for parameter in adapter_parameters(policy.decoder, "reward").values():
            parameter.requires_grad_(False)
    else:
        return reward_model(config.reward, config.model, config.run.seed)
    scorer.score.requires_grad_(False)
    return scorer, None


def _same_base(adapter: Path, policy: Opened) -> bool:
    if policy.drawn is not None:
        return False  # random weights are nobody's base
    name, fingerprint = adapter_base(adapter)
    if fingerprint is not None:
        return fingerprint == files_fingerprint(policy.folder.path)
    return name == policy.name or Path(name).is_dir() and Path(name).resolve() == policy.folder.path.resolve()
