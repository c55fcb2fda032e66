"""Rules from dicts, YAML and JSON: what is read, and what each mistake says."""

import builtins
import dataclasses
import json

import pytest

from qwix._src import qconfig, rules

RULES = [
    {"module_path": "layers/.*/mlp", "weight_qtype": "int4", "tile_size": 64},
    {"module_path": ".*", "weight_qtype": "int8", "act_qtype": "int8", "op_names": ["dot_general", "einsum"]},
]
YAML = """
- module_path: layers/.*/mlp
  weight_qtype: int4
  tile_size: 64
- module_path: .*
  weight_qtype: int8
  act_qtype: int8
  op_names: [dot_general, einsum]
"""
EXPECTED = [
    qconfig.QuantizationRule(module_path="layers/.*/mlp", weight_qtype="int4", tile_size=64),
    qconfig.QuantizationRule(
        module_path=".*", weight_qtype="int8", act_qtype="int8", op_names=("dot_general", "einsum")
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedRule(qconfig.QuantizationRule):
    rank: int
    alpha: float = 1.0


@pytest.mark.parametrize(
    "source",
    [
        RULES,
        tuple(RULES),
        {"rules": RULES},
        {"quantization": {"qwix": {"rules": RULES}}},
        YAML,
        "rules:" + YAML.replace("\n", "\n  "),
        json.dumps(RULES),
        [RULES[0], EXPECTED[1]],
    ],
)
def test_every_form_gives_the_same_rules(source):
    assert rules.load_rules(source) == EXPECTED


def test_one_rule_alone():
    assert rules.load_rules(RULES[0]) == EXPECTED[:1]
    assert rules.load_rules(EXPECTED[0]) == EXPECTED[:1]


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("b.YML", YAML), ("c.json", json.dumps(RULES))])
def test_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert rules.load_rules(path) == EXPECTED
    assert rules.load_rules(str(path)) == EXPECTED


def test_a_provider_takes_them():
    assert len(qconfig.QuantizationProvider(rules.load_rules(YAML))._rules) == 2


def test_tiles_by_axis_have_numbers_for_keys():
    (rule,) = rules.load_rules('{"weight_qtype": "int8", "tile_size": {"0": 32, "-1": 0.5}}')
    assert dict(rule.tile_size) == {0: 32, -1: 0.5}


def test_one_op_name_need_not_be_a_list():
    (rule,) = rules.load_rules("op_names: einsum")
    assert rule.op_names == ("einsum",)


def test_subclass_has_its_own_keys():
    assert rules.load_rules({"rank": 4, "alpha": 2}, RankedRule) == [RankedRule(rank=4, alpha=2)]
    with pytest.raises(ValueError, match=r"rules\[0\] lacks 'rank', which RankedRule needs"):
        rules.load_rules({"weight_qtype": "nf4"}, RankedRule)
    with pytest.raises(TypeError, match=r"rules\[0\].rank must be int, got bool: True"):
        rules.load_rules({"rank": True}, RankedRule)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            [{}, {"weight_qtyp": "int8"}],
            ValueError,
            r"rules\[1\].*'weight_qtyp'; did you mean 'weight_qtype'",
        ),
        ({"tilesize": 8}, ValueError, "did you mean 'tile_size'"),
        ({"weight_qtype": "int9"}, ValueError, r"rules\[0\]: weight_qtype: Cannot use 'int9'.*'int8'"),
        ({"weight_qtype": 8}, TypeError, r"rules\[0\]: weight_qtype"),
        ({"module_path": "a(b"}, ValueError, r"rules\[0\]: module_path .*isn't a regular expression"),
        ({"module_path": 3}, TypeError, r"rules\[0\].module_path must be str, got int: 3"),
        ({"tile_size": "128"}, TypeError, r"rules\[0\].tile_size must be int or float or .* got str: '128'"),
        ({"tile_size": True}, TypeError, "got bool: True"),
        ({"op_names": [1]}, TypeError, r"rules\[0\].op_names must be Sequence"),
        ({"act_batch_axes": 0}, TypeError, r"act_batch_axes must be Sequence\[int\], got int: 0"),
        ({"act_static_scale": "yes"}, TypeError, "act_static_scale must be bool or None, got str: 'yes'"),
        (["int8"], TypeError, r"rules\[0\] must be a mapping of QuantizationRule fields, got str: 'int8'"),
        (3, TypeError, "rules must hold a rule or a list of rules, got int: 3"),
        ("", TypeError, "got NoneType: None"),
        ("a: [1", ValueError, "neither JSON nor YAML"),
    ],
)
def test_mistakes_are_named(source, error, message):
    with pytest.raises(error, match=message):
        rules.load_rules(source)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        rules.load_rules("nowhere.yaml")
    (tmp_path / "rules.toml").write_text("")
    with pytest.raises(ValueError, match=r"\.yaml, \.yml, \.json files, got .*rules.toml"):
        rules.load_rules(tmp_path / "rules.toml")
    (tmp_path / "rules.json").write_text("- a: 1")
    with pytest.raises(ValueError, match=r"rules.json is not JSON"):
        rules.load_rules(tmp_path / "rules.json")


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[{"weight": "int8"}]')
    with pytest.raises(
        ValueError, match=r"mine.json\[0\] has the unknown key 'weight'; did you mean 'weight_"
    ):
        rules.load_rules(path)


def test_rule_type_must_be_a_rule():
    with pytest.raises(TypeError, match="rule_type must be QuantizationRule or a subclass"):
        rules.load_rules([], dict)


def test_yaml_without_pyyaml_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_yaml)
    assert rules.load_rules(json.dumps(RULES)) == EXPECTED
    with pytest.raises(ImportError, match="pip install pyyaml"):
        rules.load_rules(YAML)
