import pytest

from trueline.errors import UserError
from trueline.families.table import FAMILIES, family_of, with_template
from trueline.model.decoder import Decoder, DecoderConfig


def test_each_family_is_found_by_its_model_type():
    for name, family in FAMILIES.items():
        if not name.startswith("chatglm"):
            assert family_of({"model_type": name}) is family


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"position_encoding_2d": True}, "chatglm"),
        ({"inner_hidden_size": 16, "_name_or_path": "THUDM/chatglm-6b"}, "chatglm"),
        ({"_name_or_path": "THUDM/chatglm2-6b", "padded_vocab_size": 65024}, "chatglm2"),
        ({"_name_or_path": "models/ChatGLM3-6B-32k", "padded_vocab_size": 65024, "rope_ratio": 50}, "chatglm3"),
        ({"_name_or_path": "here", "padded_vocab_size": 65024, "rope_ratio": 50}, "chatglm3"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat", "padded_vocab_size": 65024}, "chatglm4"),
        ({"padded_vocab_size": 151552}, "chatglm4"),
        ({"padded_vocab_size": 512, "rope_ratio": 500}, "chatglm4"),
        ({"padded_vocab_size": 512}, "chatglm3"),
        ({}, "chatglm3"),
    ],
)
def test_the_generations_of_chatglm_are_told_apart(config, name):
    assert family_of({"model_type": "chatglm", "multi_query_attention": True} | config) is FAMILIES[name]


def test_another_template_changes_only_how_a_model_talks():
    family = with_template(FAMILIES["llama"], "chatml")
    assert family.render is not FAMILIES["llama"].render and family.stop == FAMILIES["qwen2"].stop
    assert family.weights is FAMILIES["llama"].weights and family.template == "chatml"
    assert with_template(family, "auto") is family
    with pytest.raises(UserError, match="model.template: 'chatlm' is not known, expected auto or one of chatglm2, chatglm3, chatml"):
        with_template(family, "chatlm")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported, only chatglm, glm, glm4, .*; nearest is 'qwen3'"),
        ({"model_type": "bert"}, "'bert' is not supported, only chatglm, glm, glm4, llama, mistral, qwen2, qwen3$"),
        ({"model_type": "chatglm3"}, "'chatglm3' is not supported, .*; nearest is 'chatglm'"),
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
    plain, glm = name == "chatglm", name in ("glm", "glm4")
    norm, more = "layer" if plain else "rms", {"qk_norm": name == "qwen3", "post_norms": name == "glm4"}
    config = DecoderConfig(8, 8, 1, 2, 1, 4, 8, qkv_bias=True, o_bias=not glm, mlp_bias=not glm, norm=norm, gated=not plain, **more)
    ours = [part.format(0) for weight in family.weights for part in weight.ours]
    assert len(ours) == len(set(ours))
    assert set(dict(Decoder(config).named_parameters())) <= set(ours)
    assert set(family.targets) == {"q", "k", "v", "o", "gate", "up", "down"} - ({"gate"} if plain else set())
    inner = [w for w in family.weights if (".attention." in w.ours[0] or ".mlp." in w.ours[0]) and "_norm" not in w.ours[0]]
    modules = {weight.theirs.split(".")[-2] for weight in inner}
    assert set(family.targets.values()) == modules
