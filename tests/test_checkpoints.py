"""Checkpoints: keys, what is trained before what, and files that are damaged or hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from robbench import checkpoints, datasets, registry
from robbench.attacks.losses import Scored, Votes
from robbench.checkpoints import Shelf, attacker_losses, cache_folder, key_of
from robbench.datasets import Split
from robbench.defense import resolve, shown, with_preset
from robbench.errors import InputError
from robbench.rules import MeanProbabilities, Vote
from robbench.training import train

CPU = torch.device("cpu")
TINY = "network=quick(width=2), epochs=1"
STANDARD, PGD_AT = f"standard({TINY})", f"pgd-at({TINY}, adversarial=fgsm(eps=0.1))"
ITO = f"ito({TINY}, base={STANDARD}, members=2)"


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:64] for tensor in digits.train)))


@pytest.fixture
def shelf(tmp_path):
    return Shelf([tmp_path / "shared", tmp_path / "own"])


@pytest.fixture
def trainings(monkeypatch):
    """The specs of what was trained, in order; weights stay as they are at the start."""
    names = []
    monkeypatch.setattr(
        checkpoints, "train", lambda defense, *args: names.append(str(defense.spec))
    )
    return names


def members(shelf, spec, dataset, seed=0):
    return shelf.members(resolve(spec)[0], dataset, seed, CPU)[:2]


def key(spec, dataset, seed=0):
    return key_of(resolve(spec)[0], dataset, seed)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture
def stored(shelf, dataset, trainings):
    """The weights file of a checkpoint of STANDARD on the shelf."""
    members(shelf, STANDARD, dataset)
    return shelf.find(key(STANDARD, dataset))


def forge(path, content):
    """Other weights under a recipe that vouches for them."""
    path.write_bytes(content)
    recipe = json.loads(path.with_suffix(".json").read_text())
    recipe["sha256"] = hashlib.sha256(content).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(recipe))


def refused(shelf, dataset, match):
    with pytest.raises(InputError, match=match) as caught:
        members(shelf, STANDARD, dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_key_depends_on_all_that_decides_the_weights(dataset, monkeypatch):
    keys = [key(ITO, dataset), key(ITO, dataset, seed=1)]
    keys.append(key(ITO, replace(dataset, train=Split(dataset.train.x + 0, dataset.train.y * 0))))
    keys.append(key(f"ito({TINY}, base={PGD_AT}, members=2)", dataset))
    keys.append(key(f"ito({TINY}, base=none, members=2)", dataset))
    keys.append(key(f"ito({TINY}, base=torchvision:IMAGENET1K_V1, members=2)", dataset))
    keys.append(key(f"ito({TINY}, base=torchvision:IMAGENET1K_V2, members=2)", dataset))
    monkeypatch.setattr(registry.defenses.get("ito"), "version", 99)
    keys.append(key(ITO, dataset))
    monkeypatch.setattr(registry.defenses.get("standard"), "version", 99)
    keys.append(key(ITO, dataset))  # the base is another one now
    assert len(set(keys)) == len(keys)


def test_the_key_is_the_same_however_the_spec_is_written(dataset):
    written = f"ito( members=2,epochs = 1, base={STANDARD}, omega=0.40, network=quick(width=2))"
    assert key(written, dataset) == key(ITO, dataset)


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "checkpoints"
    monkeypatch.delenv("ROBBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "robbench" / "checkpoints"


def test_what_was_trained_is_read_back_and_not_trained_again(shelf, dataset, monkeypatch):
    first, name = members(shelf, ITO, dataset)
    monkeypatch.setattr(checkpoints, "train", None)
    again, same_name = members(shelf, ITO, dataset)
    assert same(first, again)
    assert name == same_name == key(ITO, dataset)
    assert not any(module.training for module in again.modules())


def test_training_anew_elsewhere_gives_the_same_weights(tmp_path, dataset):
    here, _ = members(Shelf([tmp_path / "a"]), PGD_AT, dataset)
    there, _ = members(Shelf([tmp_path / "b"]), PGD_AT, dataset)
    assert same(here, there)


def test_training_leaves_the_random_stream_of_the_caller_alone(shelf, dataset):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    members(shelf, ITO, dataset)
    assert torch.equal(torch.rand(3), expected)


def test_a_fine_tuned_member_does_not_depend_on_how_many_there_are(shelf, dataset):
    two, _ = members(shelf, ITO, dataset)
    three, _ = members(shelf, ITO.replace("members=2", "members=3"), dataset)
    assert same(two, three[:2])


def test_the_base_is_trained_first_and_its_weights_are_the_start(shelf, dataset, trainings):
    fine_tuned, _ = members(shelf, ITO, dataset)
    assert trainings == [STANDARD.replace(TINY, "epochs=1, network=quick(width=2)"), trainings[-1]]
    assert trainings[-1].startswith("ito(")
    base, _ = members(shelf, STANDARD, dataset)
    assert same(fine_tuned[0], base[0])
    assert same(fine_tuned[1], base[0])


def test_a_base_of_another_network_is_refused(shelf, dataset, trainings):
    with pytest.raises(InputError, match="give both the same network"):
        members(shelf, "ito(network=quick(width=2), base=standard(network=resnet8))", dataset)


def test_only_inference_differs_so_the_weights_are_shared(shelf, dataset, trainings):
    first, _ = members(shelf, ITO, dataset)
    count = len(trainings)
    other = ITO.replace("members=2", "members=2, draws=9, ballot=nested, noise=false")
    again, _ = members(shelf, other, dataset)
    assert len(trainings) == count
    assert same(first, again)


def test_torchvision_weights_are_the_start(shelf, monkeypatch, trainings):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    asked = []
    monkeypatch.setattr(
        checkpoints,
        "torchvision_weights",
        lambda *names: asked.append(names) or theirs.state_dict(),
    )
    x = torch.rand(2, 3, 32, 32)
    labels = [str(label) for label in range(1000)]
    pictures = datasets.from_tensors(x, torch.zeros(2, dtype=torch.long), labels=labels)
    spec = "ito(network=resnet18(form=imagenet), members=1, base=torchvision:IMAGENET1K_V1)"
    (ours,), _ = members(shelf, spec, pictures)
    assert asked == [("resnet18", "IMAGENET1K_V1")]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    quiet = resolve(spec.replace("members=1", "members=1, noise=false"))[0].build((3, 32, 32), 1000)
    quiet[0].load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = theirs((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(quiet.eval()[0](x), expected)


def test_joined_defenses_bring_all_their_members(shelf, dataset):
    trained = shelf.deploy(f"{STANDARD} & {ITO}", dataset, 0, CPU)
    assert trained.keys == (key(STANDARD, dataset), key(ITO, dataset))
    single, _ = members(shelf, STANDARD, dataset)
    pair, _ = members(shelf, ITO, dataset)
    assert same(trained.deployed.members, nn.ModuleList([*single, *pair]))
    assert isinstance(trained.deployed.rule, MeanProbabilities)


def test_one_member_is_deployed_from_the_checkpoint_of_all(shelf, dataset):
    whole, one = (shelf.deploy(f"{ITO}{index}", dataset, 0, CPU) for index in ("", "[1]"))
    assert whole.keys == one.keys
    assert len(one.deployed.members) == 1
    assert same(one.deployed.members[0], whole.deployed.members[1])


def test_a_member_that_is_not_there_is_refused(shelf, dataset):
    with pytest.raises(InputError, match="members of ito are 0 to 1"):
        shelf.deploy(f"{ITO}[2]", dataset, 0, CPU)


@pytest.mark.parametrize("base", ["standard[0]", "standard & pgd-at"])
def test_a_base_is_one_whole_defense(base):
    with pytest.raises(InputError, match="base"):
        resolve(f"ito(base='{base}')")[0].base_spec()


def test_two_ways_to_write_a_base_are_one_training(dataset):
    written = ["ito(base=standard(lr=0.01, epochs=2))", "ito(base='standard( epochs=2 )')"]
    assert len({key(spec, dataset) for spec in written}) == 1


def test_the_base_is_trained_by_the_preset_of_the_dataset():
    spec = with_preset("ito(base=standard, epochs=2)", "quick", "mnist")
    assert resolve(spec)[0].base == "standard(epochs=3)"
    assert shown(str(spec), "mnist") == "ito(epochs=2)"


@pytest.mark.parametrize(
    ("spec", "losses"),
    [
        ("standard & pgd-at", {}),
        ("mmc & mmc(dimension=64)", resolve("mmc")[0].losses),
        ("ito & ito(omega=0.3)", {"vote": Votes()}),
    ],
)
def test_joined_defenses_are_attacked_by_what_fits_them(spec, losses):
    assert attacker_losses(resolve(spec)) == losses


@pytest.mark.parametrize("spec", ["mmc & standard", "smoothing & standard"])
def test_defenses_with_losses_of_their_own_are_attacked_by_the_margin_of_both(spec):
    (loss,) = attacker_losses(resolve(spec)).values()
    assert isinstance(loss, Scored)
    assert isinstance(loss.rule, MeanProbabilities)


def test_the_same_weights_are_not_joined_twice():
    with pytest.raises(InputError, match="joins the same weights twice"):
        resolve("standard(epochs=2) & standard( epochs=2 )")
    assert len(resolve("adp[0] & adp[1]")) == 2


def test_a_pool_is_filled_before_training_looks_at_it(shelf, dataset):
    base = "mixup(epochs=4, network=quick(width=2))"
    spec = f"mixup-inference(base={base}, epochs=1, lr=1e-30, select=best, variant=pl)"
    shelf.deploy(spec, dataset, 0, CPU)
    path = shelf.find(key(spec, dataset))
    point = json.loads(path.with_suffix(".json").read_text())["curve"][0]
    assert point["selected_by"] > point["validation_accuracy"] - 0.15


def test_a_defense_that_hides_its_randomness_is_refused(shelf, dataset, monkeypatch):
    monkeypatch.setattr(type(resolve(ITO)[0]), "stochastic", False)
    with pytest.raises(InputError, match="said to be deterministic, but its answers differ"):
        shelf.deploy(ITO, dataset, 0, CPU)


def test_a_deployed_defense_has_its_own_rule_and_draws(shelf, dataset, trainings):
    spec = ITO.replace("members=2", "members=2, draws=9, ballot=nested")
    deployed = shelf.deploy(spec, dataset, 0, CPU).deployed
    assert deployed.rule == Vote(nested=True, majority=True)
    assert (deployed.draws, len(deployed.members)) == (9, 2)


def test_the_first_folder_precedes_the_second(shelf, stored, dataset):
    shared = shelf.folders[0]
    shared.mkdir()
    copy = shared / stored.name
    copy.with_suffix(".json").write_bytes(stored.with_suffix(".json").read_bytes())
    copy.write_bytes(stored.read_bytes())
    assert shelf.find(stored.stem) == copy
    stored.write_bytes(b"never looked at")
    assert len(members(shelf, STANDARD, dataset)[0]) == 1


def test_the_last_folder_is_written_with_its_recipe_and_nothing_else(shelf, stored, dataset):
    assert not shelf.folders[0].exists()
    assert {path.suffix for path in shelf.folders[1].iterdir()} == {".safetensors", ".json"}
    recipe = json.loads(stored.with_suffix(".json").read_text())
    assert recipe["sha256"] == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert resolve(recipe["defense"]) == resolve(STANDARD)
    assert (recipe["dataset_hash"], recipe["train_seed"]) == (dataset.hash, 0)


class Killed(BaseException):
    """What no handler catches, as a killed process."""


def killed_while_saving(state, path):
    Path(path).write_bytes(b"half of the wei")
    raise Killed


def killed_while_renaming(monkeypatch, suffix):
    rename = Path.replace

    def replace_or_die(self, target):
        if target.suffix == suffix:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_die)


@pytest.mark.parametrize("moment", ["saving", ".safetensors", ".json"])
def test_a_run_killed_while_writing_leaves_nothing_half(
    moment, shelf, dataset, trainings, monkeypatch
):
    with monkeypatch.context() as patch:
        if moment == "saving":
            patch.setattr(checkpoints, "save_file", killed_while_saving)
        else:
            killed_while_renaming(patch, moment)
        with pytest.raises(Killed):
            members(shelf, STANDARD, dataset)
    assert shelf.find(key(STANDARD, dataset)) is None
    members(shelf, STANDARD, dataset)
    assert len(trainings) == 2
    assert shelf.find(key(STANDARD, dataset)).exists()


def test_changed_weights_are_refused_with_the_remedy(shelf, stored, dataset):
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    message = refused(shelf, dataset, "SHA-256 differs")
    assert f"delete {stored}" in message
    stored.unlink()
    stored.with_suffix(".json").unlink()
    members(shelf, STANDARD, dataset)  # the remedy works


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"\xff" * 8 + b"{}", None])
def test_corrupt_weights_are_refused(content, shelf, stored, dataset):
    forge(stored, stored.read_bytes()[:200] if content is None else content)
    refused(shelf, dataset, "cannot be read .*delete")


def test_weights_of_another_network_are_refused(shelf, stored, dataset):
    wider = "standard(network=quick(width=3), epochs=1)"
    members(shelf, wider, dataset)
    forge(stored, shelf.find(key(wider, dataset)).read_bytes())
    refused(shelf, dataset, "cannot be read")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def unpickle_all(path):
    return torch.load(path, weights_only=False)


def unpickle(path):
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("write", "read"), [(pickle.dump, unpickle), (torch.save, unpickle_all)])
def test_a_pickle_in_disguise_is_refused_and_not_executed(
    write, read, shelf, stored, dataset, tmp_path
):
    trap, disguised = tmp_path / "executed", tmp_path / "pickle"
    with disguised.open("wb") as file:
        write(Malicious(trap), file)
    forge(stored, disguised.read_bytes())
    refused(shelf, dataset, "cannot be read")
    assert not trap.exists()
    read(disguised)
    assert trap.exists()  # the trap was armed


def test_weights_without_a_recipe_are_trained_again(shelf, stored, dataset, trainings):
    stored.with_suffix(".json").unlink()
    stored.write_bytes(b"the rest of a killed run")
    members(shelf, STANDARD, dataset)
    assert len(trainings) == 2
    assert shelf.find(stored.stem) == stored


@pytest.mark.parametrize("recipe", ["", "{", "[]", "3", "{}", '{"sha256": 3}', "\udcff"])
def test_a_broken_recipe_is_refused(recipe, shelf, stored, dataset):
    stored.with_suffix(".json").write_text(recipe, errors="surrogateescape")
    refused(shelf, dataset, f"{stored.stem}.json beside it")


def test_a_recipe_without_weights_is_refused(shelf, stored, dataset):
    stored.unlink()
    refused(shelf, dataset, "No such file.*trained again")


def test_a_folder_that_cannot_be_written_is_one_line(dataset, tmp_path, trainings):
    (tmp_path / "file").write_text("in the way")
    shelf = Shelf([tmp_path / "file" / "checkpoints"])
    refused(shelf, dataset, "cannot write the checkpoint to .*ROBBENCH_CACHE")


def test_a_full_disk_is_one_line_and_leaves_no_rest(shelf, dataset, trainings, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half of the wei")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        refused(shelf, dataset, "No space left on device; free space")
    assert list(shelf.folders[-1].iterdir()) == []
    members(shelf, STANDARD, dataset)


def test_training_that_diverges_leaves_no_checkpoint(shelf, dataset, monkeypatch):
    def diverging(*args):
        train(*args)
        raise RuntimeError("diverged")

    monkeypatch.setattr(checkpoints, "train", diverging)
    with pytest.raises(RuntimeError, match="diverged"):
        members(shelf, STANDARD, dataset)
    assert shelf.find(key(STANDARD, dataset)) is None


@pytest.mark.parametrize("spec", [ITO, f"enresnet({TINY}, adversarial=none, members=2)"])
def test_weights_do_not_depend_on_which_sibling_was_trained_first(spec, tmp_path, dataset):
    noisy, _ = members(Shelf([tmp_path / "a"]), spec, dataset)
    quiet, _ = members(Shelf([tmp_path / "b"]), spec[:-1] + ", draws=3, noise=false)", dataset)
    assert same(noisy, quiet)


def test_a_deployed_defense_knows_the_hash_of_its_weights(shelf, dataset):
    trained = shelf.deploy(f"{STANDARD} & {ITO}", dataset, 0, CPU)
    found = [shelf.find(each) for each in trained.keys]
    assert list(trained.weights) == [hashlib.sha256(p.read_bytes()).hexdigest() for p in found]
