"""Laws of the configuration files, read without building what they describe."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import itertools
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.reference_resolver import ReferenceResolver

from pipeline.bundles import find_bundle_root, read_config
from pipeline.data.strict_yaml import read_yaml

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
STEPS = {"initialize", "run", "finalize"}
GLOBALS = {"monai", "torch", "np", "numpy"}  # what MONAI lends to every expression
ALIASES = {"train": "training", "evaluate": "evaluating", "inference": "inference"}
# The ids that every bundle has, from the design, and what a checkpoint is made of.
INFERENCE_IDS = {"bundle_root", "dataset_dir", "output_dir", "ckpt_path", "device", "num_workers"}
CHECKPOINT_IDS = {"architecture", "network_def", "deterministic_transforms", "definition"}
TRAINING_IDS = INFERENCE_IDS | {
    "manifest",
    "name",
    "fold",
    "fold_seed",
    "seed",
    "resume",
    "max_epochs",
    "learning_rate",
}
# What the device decides where it is not set: docs/training_plan.md tells of them.
PLANNED_IDS = {
    "batch_size",
    "accumulation_steps",
    "effective_batch_size",
    "reference_batch_size",
    "precision",
    "memory_efficient",
    "compile",
    "num_workers",
    "pin_memory",
    "threads",
    "profile",
    "memory_share",
    "memory_limit_bytes",
    "profile_memory",
    "estimate_activations",
    "detailed_memory",
    "profile_training_step",
}
TRACKING_IDS = {"is_not_rank0", "save_execute_config"}  # what `--tracking` of MONAI asks for
TRAINING_IDS |= PLANNED_IDS | TRACKING_IDS
FROM_DATA = {"class_names"}  # the data say it in training, and the checkpoint in inference
# How inference computes, not what: the same words in every bundle.
ENGINE_IDS = {
    "backend",
    "precision",
    "compile",
    "devices",
    "sw_batch_size",
    "flip_axes",
    "turn_planes",
    "ensemble",
    "average_in",
    "tune_allocator",
    "overwrite",
}
EVALUATION_IDS = {"split", "save_predictions"}


def parsed(config: dict[str, Any]) -> ConfigParser:
    parser = ConfigParser(config)
    parser.parse()
    return parser


def leaves(config: Any, id: str = "") -> list[tuple[str, Any]]:
    """Return the values of a configuration that are no list or mapping, with their ids."""
    if not isinstance(config, (dict, list)):
        return [(id, config)]
    found = []
    for _, child, value in ReferenceResolver.iter_subconfigs(id, config):
        found += leaves(value, child)
    return found


def references(config: Any) -> dict[str, set[str]]:
    """Return, for the id of each text, the ids that it refers to."""
    texts = [(id, value) for id, value in leaves(config) if isinstance(value, str)]
    return {id: set(ReferenceResolver.match_refs_pattern(text)) for id, text in texts}


def expressions(config: Any) -> dict[str, str]:
    """Return the expressions of a configuration by id, without those that import."""
    return {
        id: value[1:]
        for id, value in leaves(config)
        if isinstance(value, str) and value.startswith("$") and not id.startswith("imports")
    }


def names(expression: str) -> set[str]:
    """Return the free names of an expression, references left out."""
    tree = ast.parse(re.sub(r"@[\w:]+", "None", expression.strip()), mode="eval")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in used if isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {node.id for node in used} - bound


def imported(config: dict[str, Any]) -> dict[str, str]:
    """Return the statement of each imported name."""
    statements = [line.removeprefix("$") for line in config.get("imports", [])]
    return {re.split(r" (?:import|as) ", line)[-1]: line for line in statements}


def aliases(config: dict[str, Any]) -> set[str]:
    return {id for id, value in config.items() if value in ("@run", "%run")}


def property_ids(workflow: str) -> set[str]:
    properties = InferProperties if workflow == "inference" else TrainProperties
    return {entry["id"] for entry in properties.values()}


def definition(config: dict[str, Any], *ids: str) -> dict[str, Any]:
    """Return the text of ids and of everything that they refer to, down to what the data say."""
    parser = parsed(config)
    found: dict[str, Any] = {}
    waiting = list(ids)
    while waiting:
        id = waiting.pop()
        if id not in found and id in parser and id not in FROM_DATA:
            found[id] = parser[id]
            waiting += sorted(set().union(*references(parser[id]).values()))
    return found


def components(config: Any, id: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return every mapping with a `_target_`, with its id."""
    found = [(id, config)] if isinstance(config, dict) and "_target_" in config else []
    if isinstance(config, (dict, list)):
        for _, child, value in ReferenceResolver.iter_subconfigs(id, config):
            found += components(value, child)
    return found


def is_setting(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return not (isinstance(value, dict) and "_target_" in value) and all(map(is_setting, items))
    return not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def test_the_folder_has_what_a_bundle_must_have(bundle):
    files = ["LICENSE", "docs/README.md", "docs/data_license.txt"]
    files += [f"configs/{name}" for name in ("train.yaml", "evaluate.yaml", "inference.yaml")]
    files += ["configs/metadata.json", "configs/logging.conf"]
    assert [name for name in files if not (bundle.root / name).is_file()] == []


def test_an_overlay_says_what_it_is_merged_after(bundle):
    assert [name for name, workflows in bundle.overlays.items() if not workflows] == []


def test_no_key_stands_twice(config_file, monkeypatch):
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
    assert ConfigParser.load_config_file(config_file) == read_yaml(config_file)


def test_no_number_is_a_text(config_file):
    texts = {id: value for id, value in leaves(read_yaml(config_file)) if isinstance(value, str)}
    assert {id: text for id, text in texts.items() if NUMBER.fullmatch(text.strip())} == {}


def test_every_reference_names_an_id(combination):
    parser = parsed(combination.config)
    known = parser.ref_resolver.items
    missing = {
        id: refs - known.keys()
        for id, refs in references(parser.get()).items()
        if refs - known.keys()
    }
    assert missing == {}


def test_every_id_is_used(combination):
    """By another id, or by MONAI under its name; evaluation may use what only training sets."""
    config = parsed(combination.config).get()
    known = property_ids(combination.workflow)
    exempt = {"imports", "_meta_"} | TRACKING_IDS | STEPS | aliases(config) | known
    groups = {id.partition("::")[0] for id in known if "::" in id} & config.keys()
    ids = [id for id in config if id not in exempt | groups]
    ids += [f"{group}::{key}" for group in groups for key in config[group]]
    arguments = {f"{id}::{key}" for id, part in components(config) for key in part}
    using = [references(config)]
    if combination.workflow != "inference":
        using += [references(combination.within(other).config) for other in ("train", "evaluate")]

    def is_used(id: str) -> bool:
        inside = f"{id}::"
        return any(
            f"{ref}::".startswith(inside) or id.startswith(f"{ref}::")
            for uses in using
            for user, refs in uses.items()
            if not f"{user}::".startswith(inside)
            for ref in refs
        )

    assert [id for id in ids if id not in exempt | arguments and not is_used(id)] == []


def test_expressions_use_only_names_that_they_have(combination):
    config = combination.config
    known = GLOBALS | imported(config).keys() | set(dir(builtins))
    if combination.workflow == "evaluate":  # it builds nothing of training
        config = definition(config, *STEPS)
    unknown = {id: names(text) - known for id, text in expressions(config).items()}
    assert {id: missing for id, missing in unknown.items() if missing} == {}


def test_everything_imported_is_used(combination):
    config = combination.config
    used = set().union(*map(names, expressions(config).values()))
    assert sorted(imported(config).keys() - used) == []


def test_an_import_names_one_thing_and_no_module_by_its_package(combination):
    """`from a import b, c` loses `c`, and `from a import b` may not find a module `b`."""
    for line in imported(combination.config).values():
        whole = re.fullmatch(r"import ([\w.]+) as \w+", line)
        part = re.fullmatch(r"from ([\w.]+) import (\w+)", line)
        assert whole or part, line
        if part:
            module = importlib.import_module(part[1])
            assert hasattr(module, part[2]), line
            assert not inspect.ismodule(getattr(module, part[2])), line


def test_imports_work_in_a_fresh_process():
    """Each configuration in a process that has imported nothing but MONAI and torch."""
    everywhere = Path(find_bundle_root("fundus_vessels")).parent
    configs = [path for name in ALIASES for path in everywhere.glob(f"*/configs/{name}.yaml")]
    assert len(configs) == 15
    script = (
        "import os, sys\n"
        "from monai.bundle import ConfigParser\n"
        "for path in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        lines = ConfigParser.load_config_file(path)['imports']\n"
        "        ConfigParser({'imports': lines}).get_parsed_content('imports')\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        sys.exit(f'{path}: imports fail')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, configs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_components_exist_and_take_their_arguments(combination):
    locator = ComponentLocator()
    for id, part in components(parsed(combination.config).get()):
        target = ConfigComponent(part, id, locator).resolve_module_name()
        made = pydoc.locate(target) if isinstance(target, str) else target
        assert callable(made), f"{id}: {part['_target_']} not found"
        given = {key for key in part if not key.startswith("_")}
        parameters = inspect.signature(made).parameters
        if any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()):
            continue
        assert given <= parameters.keys(), f"{id}: {given - parameters.keys()}"
        if part.get("_mode_") == "callable":  # its caller gives the rest
            continue
        demanded = {
            key
            for key, entry in parameters.items()
            if entry.default is entry.empty and entry.kind is not entry.VAR_POSITIONAL
        }
        assert demanded <= given, f"{id}: {demanded - given} missing"


def test_a_workflow_has_the_ids_that_every_bundle_has(combination):
    config = combination.config
    demanded = {
        "train": TRAINING_IDS,
        "evaluate": TRAINING_IDS | EVALUATION_IDS | {combination.bundle.case.chosen},
        "inference": INFERENCE_IDS | ENGINE_IDS | {combination.bundle.case.chosen},
    }[combination.workflow]
    assert sorted((demanded | CHECKPOINT_IDS) - config.keys()) == []


def test_inference_goes_through_the_engine(combination):
    """The house's windows, backends, ensembles, augmentation and batch runs, in every bundle."""
    config = combination.config
    if combination.workflow == "inference":
        assert config["inferer"]["_target_"] == combination.bundle.case.inferer
        assert config["runner"]["_target_"] == "pipeline.inference.backends.Backend"
        assert config["predictor"]["_target_"] == "pipeline.inference.test_time.FlipsAndTurns"
        assert config["members"].startswith("$load_ensemble(")
        assert config["batch"]["_target_"] == "pipeline.inference.batch.BatchRun"
        assert config["dataloader"]["_target_"] == combination.bundle.case.loader
        used = set().union(*references(definition(config, "evaluator", "batch")).values())
        assert {"predictor", "members", "inferer", "runner"} <= used
        assert config["evaluator"]["network"] == "@predictor"
    else:
        target = config["validate"]["inferer"]["_target_"]
        assert target == combination.bundle.case.validate_inferer


def test_a_workflow_runs_by_its_own_name_too(combination):
    config = combination.config
    alias = ALIASES[combination.workflow]
    assert isinstance(config["run"], list)
    assert config[alias] in ("@run", "%run")


def test_handlers_are_lists_of_definitions(combination):
    """MONAI's property check and `--tracking` fail on anything else."""
    config = combination.config
    ids = ["handlers"] if combination.workflow == "inference" else ["train", "validate"]
    for id in ids:
        handlers = config[id] if id == "handlers" else config[id]["handlers"]
        assert isinstance(handlers, list)
        assert all(isinstance(handler, dict) for handler in handlers)


def test_ids_that_bundles_share_stand_in_one_order():
    """Who knows one `train.yaml` finds the way in the next."""
    everywhere = Path(find_bundle_root("fundus_vessels")).parent
    orders = [list(read_config(path)) for path in everywhere.glob("*/configs/train.yaml")]
    assert len(orders) == 5
    for first, second in itertools.combinations(orders, 2):
        shared = [id for id in first if id in second]
        assert shared == [id for id in second if id in first]
        assert set(shared) >= TRAINING_IDS


def test_an_overlay_replaces_and_never_extends(config_file):
    """An evaluation that kept the trainer's handlers would write checkpoints."""
    assert [id for id in ConfigParser.load_config_file(config_file) if id.startswith("+")] == []


def test_evaluation_writes_no_checkpoint(combination):
    if combination.workflow == "evaluate":
        targets = [part["_target_"] for part in combination.config["validate"]["handlers"]]
        assert [target for target in targets if "heckpoint" in target] == []


@pytest.mark.parametrize("id", ["network_def", "deterministic_transforms"])
def test_training_and_inference_agree(combination, id):
    """In the text, and in the text of everything that it refers to."""
    if combination.workflow == "inference":
        training = combination.within("train").config
        assert definition(combination.config, id) == definition(training, id)


def test_an_overlay_of_another_network_bears_its_name(combination):
    """A checkpoint names the overlay to merge by its `architecture`."""
    config, plain = combination.config, combination.plain.config
    changed = any(
        definition(config, id) != definition(plain, id)
        for id in ("network_def", "deterministic_transforms")
    )
    assert config["architecture"] == (combination.overlays[-1] if changed else "default")


def test_an_overlay_of_another_network_is_for_training_and_inference(combination):
    """Or a plain run could not use its checkpoints."""
    if combination.config["architecture"] != "default":
        workflows = combination.bundle.overlays[combination.overlays[-1]]
        assert set(workflows) == {"train", "inference"}


def test_the_readme_lists_the_settings_that_are_the_bundles_own(bundle):
    """Those at the top with a plain value, beside the ones that every bundle has."""
    text = (bundle.root / "docs" / "README.md").read_text(encoding="utf-8")
    settings = {
        id
        for name in ALIASES
        for id, value in read_yaml(bundle.root / "configs" / f"{name}.yaml").items()
        if is_setting(value) and "::" not in id
    }
    own = settings - TRAINING_IDS - CHECKPOINT_IDS
    assert sorted(id for id in own if not re.search(rf"`{id}\b", text)) == []


@pytest.mark.parametrize("place", ["root", "bundle", "elsewhere"])
def test_the_bundle_is_found_from_anywhere(bundle, place, monkeypatch, tmp_path):
    folders = {"root": bundle.root.parents[1], "bundle": bundle.root, "elsewhere": tmp_path}
    monkeypatch.chdir(folders[place])
    assert Path(find_bundle_root(bundle.name)).resolve() == bundle.root
    for name in ("train", "inference"):
        parser = ConfigParser(read_config(bundle.root / "configs" / f"{name}.yaml"))
        assert Path(parser.get_parsed_content("bundle_root")).resolve() == bundle.root


def test_no_key_stands_twice_in_metadata(bundle):
    metadata = bundle.root / "configs" / "metadata.json"
    assert read_config(metadata) == json.loads(metadata.read_text(encoding="utf-8"))


def test_training_is_planned_for_the_machine_by_default(bundle):
    config = read_config(bundle.root / "configs" / "train.yaml")
    planned = ("batch_size", "accumulation_steps", "precision", "memory_efficient", "num_workers")
    assert {id: config[id] for id in planned} == dict.fromkeys(planned, "auto")
    assert config["effective_batch_size"] == config["reference_batch_size"]
    assert config["plan"]["_target_"] == "pipeline.training_plan.training_plan"
