from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from pipeline.errors import ConfigurationError, lamina_cause
from pipeline.running_config import running_config


def parser_of(**config):
    return ConfigParser(
        {"imports": ["$from pipeline.running_config import running_config"], **config}
    )


NETWORK = {
    "width": 4,
    "double": "$@width * 2",
    "device": "$torch.device('cpu')",
    "activation": {"_target_": "torch.nn.ReLU", "inplace": "$@width > 2"},
    "network_def": {
        "_target_": "torch.nn.Linear",
        "in_features": "@width",
        "out_features": "$@double + 1",
    },
    "network": "$@network_def.to(@device)",
}


def test_outside_a_run_it_says_where_to_call_it():
    with pytest.raises(ConfigurationError, match="expression"):
        running_config()


def test_raw_is_what_was_written_with_macros_in_place():
    parser = parser_of(a=1, b="%c", c={"d": "@a"}, raw="$running_config().raw")
    raw = parser.get_parsed_content("raw")
    assert raw["b"] == {"d": "@a"}
    raw["a"] = 2
    assert parser.get_parsed_content("a") == 1


def test_a_definition_is_plain_and_builds_elsewhere():
    parser = parser_of(**NETWORK, text="$running_config().plain('network_def')")
    text = parser.get_parsed_content("text")
    assert text == {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 9}
    assert ConfigParser({"n": text}).get_parsed_content("n").weight.shape == (9, 4)


def test_a_reference_to_a_definition_becomes_its_text_and_one_to_an_object_stays():
    parser = parser_of(
        **NETWORK,
        block={"parts": ["@activation", "@device", "@network", "@missing"]},
        text="$running_config().plain('block')",
    )
    assert parser.get_parsed_content("text") == {
        "parts": [{"_target_": "torch.nn.ReLU", "inplace": True}, "@device", "@network", "@missing"]
    }


def test_it_works_from_the_arguments_of_what_is_being_built():
    parser = parser_of(
        **NETWORK,
        trainer={
            "_target_": "dict",
            "network": "@network",
            "handlers": [{"_target_": "dict", "config": "$running_config().resolved()"}],
            "own": "$running_config().plain('trainer')",
        },
    )
    trainer = parser.get_parsed_content("trainer")
    assert trainer["own"]["handlers"][0]["config"] == "$running_config().resolved()"
    resolved = trainer["handlers"][0]["config"]
    assert resolved["double"] == 8
    assert resolved["network_def"]["out_features"] == 9
    assert resolved["network"] == "$@network_def.to(@device)"
    assert resolved["trainer"]["network"] == "@network"


def test_resolving_runs_no_step_and_builds_nothing():
    parser = parser_of(
        a=2,
        b="$@a / 0",
        built={"_target_": "pipeline.nowhere.Absent"},
        uses="@built",
        computed="$@built + 1",
        initialize=["$1 / 0"],
        run=["$int('step')"],
        training="@run",
        inference="%run",
        text="$running_config().resolved()",
    )
    resolved = parser.get_parsed_content("text")
    assert resolved["a"] == 2
    assert resolved["b"] == "$@a / 0"
    assert resolved["built"] == {"_target_": "pipeline.nowhere.Absent"}
    assert resolved["uses"] == "@built"
    assert resolved["computed"] == "$@built + 1"
    assert resolved["run"] == resolved["inference"] == ["$int('step')"]
    assert resolved["training"] == "@run"
    assert "_meta_" not in resolved


def test_what_is_resolved_once_resolves_to_itself():
    parser = parser_of(**NETWORK, text="$running_config().resolved()")
    once = parser.get_parsed_content("text")
    again = parser_of(**{**once, "text": "$running_config().resolved()"}).get_parsed_content("text")
    assert again == once


def test_an_unknown_id_is_our_error_behind_monais():
    parser = parser_of(text="$running_config().plain('netwrok')")
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("text")
    assert "netwrok" in str(lamina_cause(caught.value))


def test_circles_of_references_end():
    parser = parser_of(
        a="@b",
        b="@a",
        c="$@d",
        d={"_target_": "dict", "text": "$running_config().plain('c')"},
        text="$running_config().plain('a')",
    )
    assert parser.get_parsed_content("text") in ("@a", "@b")
    assert parser.get_parsed_content("d") == {"text": "$@d"}


def test_a_maker_builds_a_new_object_each_time_with_what_the_call_gives():
    parser = parser_of(**NETWORK, make="$running_config().maker('network_def', ['in_features'])")
    make = parser.get_parsed_content("make")
    assert make(3).weight.shape == (9, 3)
    assert make(3) is not make(3)


def test_a_maker_says_which_argument_has_no_plain_value():
    parser = parser_of(device="$torch.device('cpu')", thing={"_target_": "dict", "at": "@device"},
                       make="$running_config().maker('thing')")  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("make")
    assert "thing::at" in str(lamina_cause(caught.value))


def test_a_maker_builds_nothing_of_what_is_left_out():
    """Else planning would build the network before anything is seeded."""
    parser = parser_of(
        made={"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3},
        optimizer={"_target_": "dict", "params": "$@made.parameters()", "momentum": 0.9},
        make="$running_config().maker('optimizer', ['params'])",
    )
    assert parser.get_parsed_content("make")() == {"momentum": 0.9}
    assert "made" not in parser.ref_resolver.resolved_content
