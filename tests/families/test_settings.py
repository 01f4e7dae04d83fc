import pytest

from trueline.errors import UserError
from trueline.families.settings import Settings


def test_every_problem_is_listed_at_once():
    keys = Settings({"a": 0, "b": "7", "c": True, "d": -1.0, "e": "yes", "hidden_act": "gelu"}, "glm")
    assert [keys.size("a", 3), keys.size("b", 3), keys.size("c", 3)] == [3, 3, 3]
    keys.number("d", 1.0)
    keys.flag("e", False)
    with pytest.raises(UserError) as caught:
        keys.check()
    assert [p.split(":")[0] for p in caught.value.problems] == ["a", "b", "c", "d", "e", "hidden_act"]


def test_null_and_missing_are_the_default():
    keys = Settings({"a": None}, "glm")
    assert (keys.size("a", 3), keys.size("b", 4), keys.number("c", 0.5), keys.flag("d", True)) == (3, 4, 0.5, True)
    keys.check()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, (1e4, 0.5)),
        ({"rope_theta": 7}, (7.0, 0.5)),
        ({"rope_theta": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 9, "partial_rotary_factor": 0.25}}, (9.0, 0.25)),
        ({"rope_theta": 7, "partial_rotary_factor": 1, "rope_scaling": {"type": "default"}}, (7.0, 1.0)),
        ({"rope_theta": 7, "rope_scaling": None}, (7.0, 0.5)),
    ],
)
def test_rotary_settings_of_older_and_newer_files(config, wanted):
    keys = Settings(config, "glm")
    assert keys.rope(0.5) == (*wanted, None)
    keys.check()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling: rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor: -2, expected a number"),
        ({"rope_parameters": "default"}, "rope_parameters: 'default', expected an object"),
        ({"rope_theta": "1e6"}, "rope_theta: '1e6', expected a number"),
    ],
)
def test_other_rotary_embeddings_are_refused(config, named):
    keys = Settings(config, "glm")
    keys.rope(1.0)
    with pytest.raises(UserError, match=named):
        keys.check()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
        ({"num_attention_heads": 5}, "5 does not divide hidden_size 64"),
    ],
)
def test_heads_that_do_not_share_out_are_refused(config, named):
    keys = Settings(config, "llama")
    keys.heads(4, None, 64)
    with pytest.raises(UserError, match=named):
        keys.check()
