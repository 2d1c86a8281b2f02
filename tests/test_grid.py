"""Cells and their ids, grids from options and YAML, and what is refused before anything runs."""

from __future__ import annotations

import itertools

import pytest
from pydantic import ValidationError
from torch import nn

from robbench import datasets, registry
from robbench.attacks import attack
from robbench.cell import Cell, Setting
from robbench.checkpoints import Trained
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.grid import Block, invalid, read_blocks
from robbench.rules import MeanLogits
from robbench.threat import Threat

CANONICAL = {
    "dataset": "digits",
    "data": "481da3cd3b203f5d",
    "n": 500,
    "defense": "ito",
    "defense_version": "1",
    "attack": "pgd",
    "attack_version": 1,
    "threat": Threat(norm="l2", eps="1/2"),
    "setting": Setting(kind="adaptive", eot=20),
}
# changed on purpose only: every committed record lies under the id of its cell
PINNED = "721664874ee1fda69425ef427927240e471ac06eea2cc8ca6555d885a9c25b63"


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture
def minimal(monkeypatch):
    """An attack `smallest` that looks for the smallest perturbation."""
    monkeypatch.setattr(registry.attacks, "_entries", dict(registry.attacks._entries))

    @attack("smallest", norms=("linf", "l2"), minimal=True)
    def smallest(access, x, y, threat, rng):
        return x


def cell(**changes):
    return Cell(**{**CANONICAL, **changes})


def block(**fields):
    return Block(**{"defense": "standard", "attack": "pgd", **fields})


def cells(digits, **fields):
    return list(block(**fields).cells(digits))


def refusal(**fields):
    with pytest.raises(ValidationError) as caught:
        block(**fields)
    return "; ".join(invalid(caught.value))


def grid(folder, text):
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def test_the_id_of_a_cell_is_what_it_always_was():
    assert cell().id == PINNED


def test_a_new_neutral_field_changes_no_id():
    class Later(Cell):
        goal: str = "error"

    assert Later(**CANONICAL).id == cell().id
    assert Later(**CANONICAL, goal="denial").id != cell().id


def test_every_field_is_part_of_the_id():
    changed = [
        cell(dataset="mnist"),
        cell(data="0" * 16),
        cell(n=100),
        cell(defense="standard"),
        cell(defense_version="2"),
        cell(attack="mim"),
        cell(attack_version=2),
        cell(threat=Threat(norm="linf", eps="1/2")),
        cell(threat=Threat(norm="l2", eps="1")),
        cell(threat=Threat(norm="l2", eps="1/2", target=3)),
        cell(setting=Setting(kind="whitebox", eot=20)),
        cell(setting=Setting(kind="adaptive", eot=10)),
        cell(setting=Setting(kind="transfer", oracle="standard", eot=20)),
        cell(setting=Setting(kind="transfer", oracle="standard", oracle_version="2", eot=20)),
        cell(train_seed=1),
        cell(seed=1),
        cell(),
    ]
    assert len({each.id for each in changed}) == len(changed)


def test_the_id_does_not_depend_on_how_a_number_is_written():
    assert cell(threat=Threat(norm="l2", eps=0.5)).id == cell().id
    assert Cell.model_validate_json(cell().model_dump_json()).id == cell().id


def test_a_transfer_attack_is_shared_by_all_targets_of_an_oracle():
    oracle = {"setting": Setting(kind="transfer", oracle="pgd-at")}
    key = cell(**oracle).attack_key()
    assert cell(**oracle, defense="standard", defense_version="7").attack_key() == key
    assert cell(setting=Setting(kind="transfer", oracle="ito")).attack_key() != key


def test_a_minimum_norm_attack_is_shared_by_all_budgets(minimal):
    keys = {
        cell(attack="smallest", threat=Threat(norm="l2", eps=eps)).attack_key()
        for eps in ("1/2", "1", "2")
    }
    assert len(keys) == 1


def test_nothing_else_shares_its_adversarial_examples(minimal):
    transfer = Setting(kind="transfer", oracle="pgd-at")
    different = [
        cell(attack=attack, setting=setting, **change)
        for attack, setting in itertools.product(
            ("pgd", "smallest"), (transfer, Setting(kind="whitebox"))
        )
        for change in (
            {},
            {"dataset": "mnist"},
            {"data": "0" * 16},
            {"n": 100},
            {"attack_version": 2},
            {"threat": Threat(norm="linf", eps="1/2")},
            {"threat": Threat(norm="l2", eps="1/2", target="random")},
            {"train_seed": 1},
            {"seed": 1},
        )
    ]
    different += [
        cell(),
        cell(threat=Threat(norm="l2", eps="1")),
        cell(defense="standard"),
        cell(defense_version="2"),
        cell(setting=transfer, threat=Threat(norm="l2", eps="1")),
        cell(setting=Setting(kind="transfer", oracle="pgd-at", oracle_version="2")),
        cell(setting=Setting(kind="transfer", oracle="pgd-at", eot=20)),
    ]
    assert len({each.attack_key() for each in different}) == len(different)


def test_every_combination_is_a_cell(digits):
    found = cells(
        digits,
        defense="ito,enresnet",
        attack="pgd,fgsm",
        norm="linf,l2",
        eps="0.1,0.2",
        setting="whitebox,adaptive",
        seed="0,1,2",
    )
    combinations = {
        (c.defense, c.attack, c.threat.norm, c.threat.eps, c.setting.kind, c.seed) for c in found
    }
    assert len(found) == len(combinations) == 2 * 2 * 2 * 2 * 2 * 3


def test_commas_inside_brackets_do_not_split(digits):
    found = cells(
        digits,
        defense="ito(omega=0.2, members=2), standard",
        attack="pgd(steps=5, random=false),fgsm",
        eps="0.1",
        setting="whitebox",
    )
    assert {each.defense for each in found} == {"ito(members=2, omega=0.2)", "standard"}
    assert {each.attack for each in found} == {"pgd(random=false, steps=5)", "fgsm"}


def test_a_setting_that_is_the_default_is_the_same_cell(digits):
    written = cells(digits, defense="ito(omega=0.4)", attack="pgd(steps=20)", eps="1/10")
    assert [c.id for c in written] == [c.id for c in cells(digits, defense="ito", eps=0.1)]


def test_budgets_can_differ_by_norm(digits):
    found = cells(digits, norm="linf,l2", eps={"Linf": "0.1,0.2", "l2": 1})
    assert [str(each.threat) for each in found] == ["linf 0.1", "linf 0.2", "l2 1"]


def test_budgets_default_to_those_of_the_dataset(digits):
    found = cells(digits, norm="linf,l2", eps={"linf": 0.1})
    assert [each.threat.eps for each in found[1:]] == list(digits.eps["l2"])
    assert len(found) == 5


def test_a_deterministic_defense_has_no_adaptive_cell(digits):
    found = cells(digits, defense="standard,ito", eps="0.1")
    kinds = [(each.defense, str(each.setting)) for each in found]
    assert kinds == [
        ("standard", "whitebox"),
        ("ito", "whitebox"),
        ("ito", "adaptive EOT 20"),
    ]


def test_a_deterministic_defense_with_its_own_loss_has_one(digits):
    found = cells(digits, defense="ito(omega=0)", eps="0.1", setting="adaptive")
    assert [str(each.setting) for each in found] == ["adaptive"]


def test_an_oracle_is_not_transferred_to_itself(digits):
    found = cells(
        digits, defense="standard,ito", oracle="standard,ito", setting="transfer", eps=0.1
    )
    assert [(each.defense, str(each.setting)) for each in found] == [
        ("standard", "transfer from ito EOT 20"),
        ("ito", "transfer from standard"),
    ]


def test_a_query_attack_runs_in_the_black_box(digits):
    found = cells(digits, attack="torchattacks:Square", eps="0.1")
    assert [each.setting.kind for each in found] == ["blackbox"]


def test_a_model_of_the_caller_is_a_defense(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), digits.shape, 10)
    mine = {"model:mine": Trained(deployed, ())}
    grid = block(defense="model:mine,standard", eps="0.1")
    assert [each.defense for each in grid.cells(digits, models=mine)] == ["model:mine", "standard"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 8}, "eps: ε = 8 is more than the whole box [0, 1] under linf; write 8/255"),
        ({"eps": "-0.1"}, "eps: ε = -0.1 is not positive"),
        ({"eps": "0.1,0"}, "eps: ε = 0 is not positive"),
        ({"eps": "nan"}, "eps: ε = nan is not a number"),
        ({"eps": float("nan")}, "eps: ε = nan is not a number"),
        ({"eps": ""}, "eps is empty"),
        ({"eps": {"l3": 1}}, "eps.l3: unknown norm 'l3'"),
        ({"eps": {"l2": [1, "x"]}}, "eps.l2: ε = x is not a number"),
        ({"norm": "l2,l7"}, "norm: unknown norm 'l7'"),
        ({"norm": "l0"}, "norm: pgd cannot do the norm l0; it does l1, l2, linf"),
        ({"attack": "rotatoin"}, "attack: unknown attack 'rotatoin'; did you mean 'rotation'?"),
        ({"attack": "pgd(step_size=1)"}, "unknown setting of attack pgd 'step_size'"),
        ({"attack": []}, "attack is empty"),
        ({"defense": "itto"}, "defense: unknown defense 'itto'; did you mean 'ito'?"),
        ({"oracle": "standart"}, "oracle: unknown oracle 'standart'; did you mean 'standard'?"),
        ({"setting": "whitebxo"}, "setting: unknown setting 'whitebxo'; did you mean 'whitebox'"),
        ({"setting": "blackbox"}, "setting: pgd needs gradients"),
        ({"setting": "transfer"}, "setting: transfer needs an oracle"),
        (
            {"attack": "torchattacks:Square", "setting": "whitebox"},
            "setting: torchattacks:Square only asks queries, so its setting is blackbox",
        ),
        ({"target": "³"}, "target: '³' is not a label"),
        ({"target": -1}, "target: '-1' is not a label"),
        ({"target": 1, "attack": "torchattacks:APGD"}, "torchattacks:APGD cannot be targeted"),
        ({"n": 0}, "n = 0: Input should be greater than or equal to 1"),
        ({"eot": 0}, "eot: 0 is no number of draws"),
        ({"seed": "a"}, "seed = 'a'"),
    ],
    ids=str,
)
def test_impossible_blocks_are_refused_in_words(fields, message):
    assert message in refusal(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 501}, "n = 501, but the test split of digits has 500 images"),
        ({"target": 10}, "target = 10, but labels of digits are 0 to 9"),
        ({"attack": "art:SaliencyMapMethod", "norm": "l0"}, "digits has no default ε for l0"),
    ],
    ids=str,
)
def test_what_the_dataset_has_not_got_is_refused(digits, fields, message):
    with pytest.raises(InputError, match=message):
        cells(digits, **fields)


def test_all_that_is_wrong_with_a_block_is_said_at_once():
    text = refusal(defense="itto", attack="pgdd,mmi", norm="l9", eps="8,0", sead=1)
    for part in ("'itto'", "'pgdd'", "'mmi'", "'l9'", "ε = 0", "did you mean 'seed'?"):
        assert part in text


def test_a_file_is_one_block(tmp_path):
    text = "defense: [standard, ito]\nattack: pgd\neps: {linf: [0.1, 8/255], l2: 1}\ntarget: 3\n"
    (read,) = read_blocks(grid(tmp_path, text))
    same = block(defense=["standard", "ito"], eps={"linf": "0.1,8/255", "l2": "1"}, target="3")
    assert read.model_dump() == same.model_dump()


def test_a_file_is_defaults_and_a_list_of_blocks(tmp_path):
    text = "dataset: mnist\nattack: pgd\ngrid:\n - {defense: ito}\n - {defense: ito, attack: mim}\n"
    read = read_blocks(grid(tmp_path, text))
    assert [(each.dataset, each.defense, each.attack) for each in read] == [
        ("mnist", ["ito"], ["pgd"]),
        ("mnist", ["ito"], ["mim"]),
    ]


def test_mistakes_of_all_blocks_are_reported_with_file_and_key(tmp_path):
    path = grid(tmp_path, "grid:\n - {defense: itto, atack: pgd}\n - {attack: pgd, n: many}\n")
    with pytest.raises(InputError) as caught:
        read_blocks(path)
    assert str(caught.value).split("; ") == [
        f"{path}: grid[0]: defense: unknown defense 'itto'",
        "did you mean 'ito'?",
        f"{path}: grid[0]: attack is missing",
        f"{path}: grid[0]: unknown key 'atack'",
        "did you mean 'attack'?",
        f"{path}: grid[1]: n = 'many': Input should be a valid integer, unable to parse string as"
        " an integer",
        f"{path}: grid[1]: defense is missing",
    ]


def test_what_the_dataset_has_not_got_names_the_file(tmp_path, digits):
    path = grid(tmp_path, "{defense: ito, attack: pgd, n: 501}")
    (read,) = read_blocks(path)
    with pytest.raises(InputError, match=f"{path}: n = 501"):
        list(read.cells(digits))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defense: [ito", "is not YAML"),
        ("- ito", "must be a mapping"),
        ("", "must be a mapping"),
        ("grid: ito", "grid must be a list of mappings"),
        ("grid: [ito]", "grid must be a list of mappings"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = grid(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_blocks(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_blocks(tmp_path / "absent.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot read the grid"):
        read_blocks(tmp_path / "picture.yaml")


def test_a_block_says_what_a_defense_has_not():
    data = datasets.load("digits")
    block = Block(defense="adp, standard", attack="pgd", setting="transfer",
                  oracle="noise-off, members", eps="0.1", n=4)  # fmt: skip
    assert {cell.defense for cell in block.cells(data)} == {"adp"}
    assert block.left_out == [
        "adp has no noise-off", "standard has no noise-off", "standard has no members"
    ]  # fmt: skip
    block = Block(defense="ito, pgd-at", attack="pgd", goal="error, denial", eps="0.1", n=4)
    assert list(block.cells(data))
    assert block.left_out == ["pgd-at always answers, so that it has no denial"]
    assert "pgd-at is deterministic" in block.reasons[-1]
