"""Records: what is written is what is read, damage is named, and no write leaves half a file."""

from __future__ import annotations

import base64
import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from robbench.cell import Cell, Setting
from robbench.errors import InputError
from robbench.records import Record, Store, _decode, newest, read, without_versions
from robbench.threat import Threat

N = 3
NUMBERS = st.sampled_from(["?", "u1", "<i2", ">i4", "<i8", "<f2", ">f4", "<f8"]).map(np.dtype)
BROKEN = {
    "not JSON": lambda data: "{",
    "empty": lambda data: "",
    "deeply nested": lambda data: "[" * 200_000,
    "a list": lambda data: "[]",
    "another id": lambda data: data | {"id": "0" * 64},
    "another cell": lambda data: data | {"cell": data["cell"] | {"n": 4}},
    "no counts": lambda data: data | {"ok": None},
    "unknown field": lambda data: data | {"okay": 1},
    "no draws": lambda data: data | {"draws": 0},
    "more counts than draws": lambda data: data | {"draws": 3},
    "too few images": lambda data: with_array(data, shape=[2], raw=b"\1\1"),
    "no cost": lambda data: data | {"cost": {}},
    "a cost less than nothing": lambda data: data | {"cost": data["cost"] | {"seconds": -1.0}},
    "float counts": lambda data: with_array(data, dtype="<f4", raw=b"\0" * 12),
    "objects": lambda data: with_array(data, dtype="|O"),
    "structured": lambda data: with_array(data, dtype="<i4,<i4"),
    "no dtype": lambda data: with_array(data, dtype="colour"),
    "dtype of the wrong type": lambda data: with_array(data, dtype=7),
    "shape of the wrong type": lambda data: with_array(data, shape="three"),
    "shape that does not fit": lambda data: with_array(data, shape=[4]),
    "truncated": lambda data: with_array(data, cut=4),
    "not base64": lambda data: data | {"ok": data["ok"] | {"zlib": "ä"}},
    "missing key": lambda data: data | {"ok": {"dtype": "|u1"}},
}


def cell(**changes):
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": N,
        "defense": "ito",
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(norm="linf", eps="1/10"),
        "setting": Setting(kind="whitebox"),
    }
    return Cell(**(fields | changes))


def record(of=None, **changes):
    of = of or cell()
    fields = {
        "id": of.id,
        "cell": of,
        "draws": 5,
        "ok": np.array([5, 0, 2], dtype=np.uint8),
        "err": np.array([0, 5, 1], dtype=np.uint8),
        "clean_ok": np.array([5, 5, 4], dtype=np.uint8),
        "clean_err": np.array([0, 0, 1], dtype=np.uint8),
        "distance": np.array([0.1, 0.05, 0], dtype=np.float32),
        "cost": {"forwards": 20.0, "backwards": 20.0, "queries": 20.0, "seconds": 0.1},
    }
    return Record(**(fields | changes))


def with_array(data, *, raw=None, cut=0, **changes):
    """The JSON of a record with other counts `ok`."""
    value = data["ok"] | changes
    if raw is not None:
        value["zlib"] = base64.b64encode(zlib.compress(raw)).decode()
    if cut:
        value["zlib"] = base64.b64encode(base64.b64decode(value["zlib"])[:-cut]).decode()
    return data | {"ok": value}


def transfer(version):
    return Setting(kind="transfer", oracle="standard", oracle_version=version)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


def only_file(store):
    (path,) = (path for path in store.folder.rglob("*") if path.is_file())
    return path


@given(arrays.arrays(NUMBERS, arrays.array_shapes(min_dims=1, max_dims=3, max_side=6)))
@settings(max_examples=100, deadline=None)
def test_arrays_survive_the_file(values):
    text = record(trace={"loss": values}).text()
    back = Record.model_validate_json(text).trace["loss"]
    assert back.shape == values.shape
    assert back.dtype == values.dtype.newbyteorder("<")
    assert back.tobytes() == values.astype(back.dtype).tobytes()  # NaN and -0.0 included


def test_a_record_survives_the_file(store):
    written = record(trace={"loss": np.full((5, N), np.nan, np.float16)}, provenance={"a": [1]})
    store.put(written)
    back = store.get(cell())
    assert back.text() == written.text()
    assert back.cell == written.cell


def certain(**changes):
    """How sure a defense was, and which label was its first one."""
    counts, scores = np.array([5, 0, 2], dtype=np.uint8), np.array([2, -1, 0.5], dtype=np.float32)
    fields = {"best": counts, "clean_best": counts, "score": scores, "clean_score": scores}
    return record(**(fields | changes))


def test_how_sure_a_defense_was_survives_the_file(store):
    store.put(certain())
    back = store.get(cell())
    for name in ("best", "clean_best", "score", "clean_score"):
        assert np.array_equal(getattr(back, name), getattr(certain(), name))
    assert back.score.dtype == np.float32


def test_a_record_of_the_time_before_scores_is_read(store):
    path = store.put(record())
    data = json.loads(path.read_text())
    for name in ("best", "clean_best", "score", "clean_score"):
        del data[name]
    path.write_text(json.dumps(data))
    assert read(path).score is None


@pytest.mark.parametrize("name", ["best", "clean_best", "score", "clean_score"])
def test_a_score_that_is_not_of_every_image_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is not a number for each of 3 images"):
        certain(**{name: np.zeros(2, dtype=np.float32)})


def test_the_text_does_not_depend_on_the_order_of_fields():
    assert (
        record(trace={"a": np.zeros(N), "b": np.ones(N)}).text()
        == record(trace={"b": np.ones(N), "a": np.zeros(N)}).text()
    )


def test_a_record_lies_below_its_dataset_and_defense(store):
    of = cell(dataset="folder:a/b", defense="ito(omega=0.2) & x/../../y")
    path = store.put(record(of))
    assert path.parent.parent.parent == store.folder
    assert path.name == f"{of.id[:20]}.json"
    assert [each.id for each in store.all()] == [of.id]
    assert [each.id for each in store.all("folder:a/b")] == [of.id]
    assert list(store.all("folder:a")) == []


def test_cells_that_were_not_run_or_failed_are_to_be_run(store):
    assert store.get(cell()) is None
    store.put(Record(id=cell().id, cell=cell(), status="failed", reason="no gradient"))
    assert store.get(cell()) is None
    assert [each.reason for each in store.all()] == ["no gradient"]


def test_another_attempt_replaces_a_failed_record(store):
    store.put(Record(id=cell().id, cell=cell(), status="failed", reason="no gradient"))
    store.put(record())
    assert [each.status for each in store.all()] == ["ok"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_left_alone(store, kind):
    path = store.put(record())
    changed = BROKEN[kind](json.loads(path.read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text(text)
    for reading in (lambda: read(path), lambda: list(store.all()), lambda: store.get(cell())):
        with pytest.raises(InputError, match="is broken") as caught:
            reading()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_the_message_says_what_is_broken(store):
    path = store.put(record())
    path.write_text(json.dumps(with_array(json.loads(path.read_text()), dtype="|O")))
    with pytest.raises(InputError, match=r"\(ok: arrays of object are not read\)"):
        read(path)


def test_a_file_of_another_schema_is_passed_over(store):
    path = store.put(record())
    text = json.dumps({"schema_version": 2, "whatever": True})
    path.write_text(text)
    assert read(path) is None
    assert list(store.all()) == []
    assert path.read_text() == text


def test_a_file_of_another_schema_is_refused_and_not_overwritten(store):
    path = store.put(record())
    path.write_text('{"schema_version": 2}')
    for use in (lambda: store.get(cell()), lambda: store.put(record())):
        with pytest.raises(InputError, match="of another schema version .* left as it is; choose"):
            use()
    assert path.read_text() == '{"schema_version": 2}'
    assert only_file(store) == path


def test_a_broken_file_is_not_overwritten(store):
    path = store.put(record())
    path.write_text("{")
    with pytest.raises(InputError, match="is broken"):
        store.put(record())
    assert path.read_text() == "{"


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"defense_version": "9"}, {"defense_version": "10"}),
        ({"defense_version": "1"}, {"defense_version": "1<2"}),
        ({"defense_version": "1&9"}, {"defense_version": "1&10"}),
        ({"attack_version": 9}, {"attack_version": 10}),
        ({"defense_version": "1", "attack_version": 2}, {"defense_version": "2"}),
        ({"setting": transfer("9")}, {"setting": transfer("10")}),
    ],
    ids=str,
)
def test_the_newest_versions_supersede_the_others(older, newer):
    old, new, other = record(cell(**older)), record(cell(**newer)), record(cell(**older, seed=1))
    assert newest([new, other, old], without_versions) == [new, other]


def test_a_write_that_is_killed_leaves_the_old_record(store, monkeypatch):
    path = store.put(record())
    old = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt  # nothing of ours cleans up after it, as after SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put(record(draws=9))
    assert len(list(path.parent.iterdir())) == 2, "the temporary file is there"
    assert path.read_bytes() == old
    assert [each.draws for each in store.all()] == [5]


def test_two_processes_never_write_the_same_temporary_file(store, monkeypatch):
    written = []
    monkeypatch.setattr(Path, "replace", lambda self, target: written.append(self))
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        store.put(record())
    assert len(set(written)) == 2


def test_a_full_disk_keeps_what_is_there(store, monkeypatch):
    store.put(record())
    other = record(cell(n=N, seed=1))

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match="No space left on device; finished cells are kept"):
            store.put(other)
    assert [each.id for each in store.all()] == [cell().id]
    assert only_file(store) == store.path(cell()), "no temporary file is left"


def test_hidden_files_and_folders_are_no_records(store):
    path = store.put(record())
    text, hidden = path.read_text(), path.parent.parent / ".hidden" / path.name
    hidden.parent.mkdir()
    path.rename(hidden)
    path.with_name(".forged.json").write_text(text)
    assert list(store.all()) == []


@pytest.mark.parametrize("blocked", ["out", "out/records"])
def test_a_file_in_place_of_a_folder_is_a_mistake_of_the_user(store, blocked):
    path = store.root.parent / blocked
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(InputError, match="cannot write to .* choose another folder with --out"):
        store.put(record())
    with pytest.raises(InputError, match="cannot write to"):
        store.check_writable()


def test_a_folder_without_permission_is_found_before_any_work(store, monkeypatch):
    def refuse(self, text):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(InputError, match="Permission denied; finished cells are kept"):
        store.check_writable()


def test_a_writable_folder_is_left_without_traces(store):
    store.check_writable()
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_an_array_is_not_unpacked_beyond_its_shape():
    """A few bytes that would become gigabytes; a record may come from a stranger."""
    bomb = base64.b64encode(zlib.compress(bytes(10**7))).decode()
    with pytest.raises(ValueError, match="not those of shape"):
        _decode({"dtype": "|u1", "shape": [3], "zlib": bomb})
    with pytest.raises(ValueError, match="is not read"):
        _decode({"dtype": "|u1", "shape": [10**12], "zlib": bomb})
