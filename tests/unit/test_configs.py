from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.configs import check_overrides, parse_value, read_config
from pipeline.errors import ConfigurationError

CONFIG = {
    "max_epochs": 3,
    "learning_rate": 0.01,
    "resume": False,
    "early_stopping": {"enabled": True, "patience": 5},
    "monitor": {"_target_": "Monitor", "patience": "@early_stopping::patience"},
    "network_def": {"_target_": "Net", "depths": [4, 8]},
    "network": "$@network_def.to('cpu')",
    "train": {"handlers": [{"_target_": "A"}, {"_target_": "B"}]},
}


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_a_value_written_by_python_is_read_back(value):
    text = "null" if value is None else str(value)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E4", 10000.0),
        ("-2", -2),
        (".5", 0.5),
        ("true", True),
        ("none", None),
        ("auto", "auto"),
        ("007", "007"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("data/a: b", "data/a: b"),
        ("no", "no"),
        ("$@a + 1", "$@a + 1"),
        ("@network", "@network"),
        ("[64, 1e-4, x]", [64, 0.0001, "x"]),
        ("{a: 1e-4}", {"a": 0.0001}),
        ('"8"', "8"),
        ("", ""),
    ],
)
def test_the_text_of_a_command_line_becomes_the_value_it_means(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_brackets_that_do_not_close_are_one_line():
    with pytest.raises(ConfigurationError, match=r"\[1, 2") as caught:
        parse_value("[1, 2")
    assert "\n" not in str(caught.value)


def test_known_ids_pass_unchanged():
    overrides = {
        "max_epochs": 1,
        "early_stopping#patience": 2,
        "network_def::depths::1": 16,
        "train::handlers::0::_target_": "C",
    }
    checked = check_overrides(CONFIG, overrides)
    assert checked == {key.replace("#", "::"): value for key, value in overrides.items()}
    assert CONFIG["network_def"]["depths"] == [4, 8]


def test_a_path_becomes_text():
    assert check_overrides({"output_dir": None}, {"output_dir": Path("runs")}) == {
        "output_dir": "runs"
    }


@pytest.mark.parametrize(
    ("id", "hint"),
    [
        ("max_epoch", "did you mean max_epochs"),
        ("patience", "did you mean early_stopping::patience"),
        ("early_stopping.patience", "did you mean early_stopping::patience"),
        ("early_stoping::patience", "did you mean early_stopping::patience"),
        ("early_stopping::patienc", r"position 2 of 2\); did you mean early_stopping::patience"),
        ("network_def::depths::2", "a number from 0 to 1"),
        ("network_def::depths::x", "a number from 0 to 1"),
        ("network::depths", "set what it refers to"),
        ("max_epochs::x", "plain value"),
        ("zzz", "settings here: early_stopping, learning_rate, max_epochs, resume$"),
    ],
)
def test_an_unknown_id_is_refused_with_the_closest_one(id, hint):
    with pytest.raises(ConfigurationError, match=rf"^--{id}: .*{hint}"):
        check_overrides(CONFIG, {id: 1})


def test_a_plus_adds_a_key_or_extends_what_is_there():
    checked = check_overrides(
        CONFIG,
        {"+network_def::dropout": 0.1, "+network_def::depths": [16], "+early_stopping": {"a": 1}},
    )
    assert checked["network_def::dropout"] == 0.1
    assert checked["network_def::depths"] == [4, 8, 16]
    assert checked["early_stopping"] == {"enabled": True, "patience": 5, "a": 1}


def test_a_plus_does_not_make_a_top_level_id():
    with pytest.raises(ConfigurationError, match="max_epochs"):
        check_overrides(CONFIG, {"+max_epoch": 1})


def test_a_switch_without_value_is_no_number():
    with pytest.raises(ConfigurationError, match="--max_epochs needs a number"):
        check_overrides(CONFIG, {"max_epochs": True})
    assert check_overrides(CONFIG, {"resume": True}) == {"resume": True}


def test_words_where_a_number_stands_are_refused_and_expressions_are_not():
    with pytest.raises(ConfigurationError, match=r"--max_epochs needs a number such as .* 'abc'"):
        check_overrides(CONFIG, {"max_epochs": "abc"})
    assert check_overrides(CONFIG, {"max_epochs": "$2 * 3"}) == {"max_epochs": "$2 * 3"}


def write(folder: Path, **files: str) -> list[Path]:
    paths = [folder / f"{name}.yaml" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text)
    return paths


def test_files_merge_as_monai_merges_them(tmp_path):
    from monai.bundle import ConfigParser

    paths = write(
        tmp_path,
        first="a: {b: {c: 1}}\nlist: [1]\nwhole: {x: 1}\nnumber: 1e-3\n",
        second="a::b::c: 2\na#b#d: 3\n+list: [2]\n+a: {e: 4}\nwhole: {y: 2}\nnew: $1 + 1\n",
    )
    assert read_config(paths) == ConfigParser.load_config_files([str(path) for path in paths])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "twice"),
        ("a: {b: 1, b: 2}\n", "twice"),
        ("a: [1\n", "expected"),
        ("- 1\n", "expected a mapping"),
        ("a::b: 1\n", "no id 'a'"),
        ("+a: [1]\n", "no id 'a'"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(tmp_path, text, message):
    (path,) = write(tmp_path, config=text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_refuses_duplicates_too(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1e-3, "b": 2}')
    assert read_config(path) == {"a": 0.001, "b": 2}
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigurationError, match="twice"):
        read_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"absent\.yaml: not found"):
        read_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text", ["scan #1", "a#b::c#", "$HOME/x", "@photos", "%a#b", "q'\"#\\", "眼#"]
)
def test_a_path_reaches_monai_as_it_is(text):
    from monai.bundle import ConfigParser

    parser = ConfigParser({"folder": None, "folders": [], "used": "$@folder + '/x'"})
    path = PurePosixPath(text)
    parser.update(check_overrides(parser.config, {"folder": path, "folders": [path]}))
    assert parser.get_parsed_content("folder") == text
    assert parser.get_parsed_content("folders") == [text]
    assert parser.get_parsed_content("used") == f"{text}/x"


def test_a_text_with_a_hash_is_no_id_and_an_expression_stays_one():
    config = {"name": None, "network": None}
    checked = check_overrides(config, {"name": "run #2", "network": "$@name + '#'"})
    assert checked["name"] == r"$'run \x232'"
    assert checked["network"] == "$@name + '#'"
