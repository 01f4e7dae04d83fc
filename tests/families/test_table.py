import pytest

from trueline.errors import UserError
from trueline.families.table import FAMILIES, family_of
from trueline.model.decoder import Decoder, DecoderConfig


def test_each_family_is_found_by_its_model_type():
    assert sorted(FAMILIES) == ["chatglm", "glm", "llama", "qwen2"]
    assert all(family_of({"model_type": name}) is family for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "qwen3"}, "'qwen3' is not supported, only chatglm, glm, llama, qwen2; nearest is 'qwen2'"),
        ({"model_type": "bert"}, "'bert' is not supported, only chatglm, glm, llama, qwen2$"),
        ({}, "model_type is missing"),
        ({"model_type": ["glm"]}, "model_type is missing"),
    ],
)
def test_an_unknown_one_names_the_known_and_the_nearest(config, sentence):
    with pytest.raises(UserError, match=sentence):
        family_of(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_table_covers_the_decoder_exactly_once(name):
    family = FAMILIES[name]
    plain = name == "chatglm"
    config = DecoderConfig(
        8, 8, 1, 2, 1, 4, 8, qkv_bias=True, o_bias=name != "glm", mlp_bias=name != "glm", norm="layer" if plain else "rms", gated=not plain
    )
    ours = [part.format(0) for weight in family.weights for part in weight.ours]
    assert len(ours) == len(set(ours))
    assert set(dict(Decoder(config).named_parameters())) <= set(ours)
    assert set(family.targets) == {"q", "k", "v", "o", "gate", "up", "down"} - ({"gate"} if plain else set())
    inner = [w for w in family.weights if ".attention." in w.ours[0] or ".mlp." in w.ours[0]]
    modules = {weight.theirs.split(".")[-2] for weight in inner}
    assert set(family.targets.values()) == modules
