"""Records: what running a cell left, raw, one JSON file each; and the folder they lie in.

The images of an attack, where they are kept, are an .npz file beside the record.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from robbench.cell import Cell
from robbench.errors import InputError, problem_of

SCHEMA = 1
LARGEST = 2**28  # bytes of one array
LARGEST_IMAGES = 2**32  # bytes of all images of a record
COSTS = ("forwards", "backwards", "queries", "seconds")  # per image but for the seconds


def _encode(array: np.ndarray) -> dict[str, Any]:
    """dtype, shape and the zlib-compressed little-endian bytes in base64."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(little.tobytes(), 9)).decode()
    return {"dtype": little.dtype.str, "shape": list(array.shape), "zlib": data}


def _decode(value: object) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "zlib"}:
        raise ValueError("not an array of dtype, shape and zlib")
    try:
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"arrays of {dtype} are not read")
        size = math.prod(value["shape"]) * dtype.itemsize
        if not 0 <= size <= LARGEST:
            raise ValueError(f"an array of shape {value['shape']} is not read")
        # a record may come from a stranger: no more is unpacked than the shape says
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(value["zlib"], validate=True), size + 1)
        if len(raw) != size or not unpacker.eof:
            raise ValueError(f"the bytes of an array are not those of shape {value['shape']}")
        return np.frombuffer(raw, dtype).reshape(value["shape"])
    except (TypeError, zlib.error) as error:
        raise ValueError(str(error)) from None


Array = Annotated[np.ndarray, BeforeValidator(_decode), PlainSerializer(_encode)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """The raw outcome of a cell; metrics, intervals and flags are derived from it.

    draws is r, the fresh scoring draws. ok, err, clean_ok and clean_err (N,) uint8 count draws
    that were right, and wrong but not abstained, on x' and on x. distance (N,) float32 in the
    cell's norm. best and clean_best count draws whose first label was right, refused or not, and
    score and clean_score (N,) float32 say how sure the defense was (rules.Answer), on average;
    older records have none of the four. cost has all of COSTS. A failed cell has a reason and no
    numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    schema_version: int = SCHEMA
    id: str
    cell: Cell
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = None
    draws: Annotated[int, Field(ge=1, le=255)] = 1
    ok: Array | None = None
    err: Array | None = None
    clean_ok: Array | None = None
    clean_err: Array | None = None
    distance: Array | None = None
    best: Array | None = None
    clean_best: Array | None = None
    score: Array | None = None
    clean_score: Array | None = None
    trace: dict[str, Array] = {}
    cost: dict[str, Amount] = {}
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> Record:
        """Counts of a finished cell fit its images and its draws, or no number can be trusted."""
        if self.status == "failed":
            return self
        n = self.cell.n
        for names in (("ok", "err"), ("clean_ok", "clean_err")):
            total = np.zeros(n, dtype=np.int64)
            for name in names:
                counts = getattr(self, name)
                if counts is None or counts.shape != (n,) or counts.dtype != np.uint8:
                    raise ValueError(f"{name} is not a count for each of {n} images")
                total += counts
            if (total > self.draws).any():
                raise ValueError(f"{' + '.join(names)} is more than {self.draws} draws")
        for name in ("best", "clean_best", "score", "clean_score"):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise ValueError(f"{name} is not a number for each of {n} images")
        if self.distance is None or self.distance.shape != (n,):
            raise ValueError(f"distance is not a number for each of {n} images")
        if set(self.cost) != set(COSTS):
            raise ValueError(
                f"cost has {', '.join(self.cost) or 'nothing'}, not {', '.join(COSTS)}"
            )
        return self

    @property
    def passes(self) -> float:
        """Forward and backward passes of single networks, per image."""
        return self.cost["forwards"] + self.cost["backwards"]

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


class Store:
    """Records below a folder: records/DATASET/DEFENSE/ID.json, and ID.npz where x' is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "records"

    def path(self, cell: Cell) -> Path:
        defense = _folder_name(cell.defense)
        return self.folder / _folder_name(cell.dataset) / defense / f"{cell.place[:20]}.json"

    def get(self, cell: Cell, images: bool = False) -> Record | None:
        """The finished record of a cell; None where there is none or only a failed one.

        images: None also for a record whose x' is not beside it.
        """
        if images and not images_file(self.path(cell)).exists():
            return None
        record = self._there(self.path(cell))
        return record if record and record.status == "ok" and record.id == cell.id else None

    def _there(self, path: Path) -> Record | None:
        """The record of a file that a cell may be written to; what this version cannot read is
        an InputError, so that it is neither run in vain nor overwritten."""
        if not path.exists():
            return None
        record = read(path)
        if record is None:
            raise InputError(
                f"the record {path} is of another schema version (this robbench writes {SCHEMA});"
                " it is left as it is; choose another folder with --out, or install the robbench"
                " that wrote it"
            )
        return record

    def put(self, record: Record, images: np.ndarray | None = None) -> Path:
        """Write under a temporary name and rename: a reader sees all of it or nothing. images: x'
        (N, C, H, W), written first; without them those of an older record go."""
        path = self.path(record.cell)
        self._there(path)

        def write(file: Path) -> None:
            if images is None:
                images_file(path).unlink(missing_ok=True)
            file.write_text(record.text(), encoding="utf-8")

        if images is not None:
            write_whole(images_file(path), lambda file: _save_images(file, images))
        write_whole(path, write)
        return path

    def all(self, dataset: str | None = None) -> Iterator[Record]:
        """Every readable record of this schema, in the order of paths."""
        pattern = f"{_folder_name(dataset) if dataset else '*'}/*/*.json"
        for path in sorted(self.folder.glob(pattern)):
            if any(part.startswith(".") for part in path.relative_to(self.folder).parts):
                continue  # the store names nothing so but what it is just writing
            record = read(path)
            if record is not None:
                yield record

    def check_writable(self) -> None:
        """Fail before hours of work rather than after."""
        probe = self.folder / f".{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise unwritable(self.folder, error) from None


def newest(records: Iterable[Record], alike: Callable[[Cell], Hashable]) -> list[Record]:
    """Of the records whose cells are alike, those of the newest versions, failed ones too.

    A newer version of the defense counts first, then of the attack, then of the oracle.
    """
    listed = list(records)
    latest: dict[Hashable, tuple[object, ...]] = {}
    for cell in (record.cell for record in listed):
        latest[alike(cell)] = max(versions(cell), latest.get(alike(cell), ()))
    return [record for record in listed if versions(record.cell) == latest[alike(record.cell)]]


def without_versions(cell: Cell) -> Cell:
    """What is left of a cell when versions do not matter."""
    setting = cell.setting.model_copy(update={"oracle_version": "", "suite": ""})
    return cell.model_copy(update={"defense_version": "", "attack_version": 0, "setting": setting})


def versions(cell: Cell) -> tuple[object, ...]:
    """Those of defense, attack and oracle, to be compared with others."""
    return (
        version_numbers(cell.defense_version),
        cell.attack_version,
        version_numbers(cell.setting.oracle_version),
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """`2<1&10` by its numbers: as text, 10 would come before 2."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8; its folder is made."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Under a temporary name, then renamed: a reader sees the old file or all of the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path.parent, error) from None


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of one that is just being written."""
    return re.fullmatch(r"\.(.+\.)?\d+\.tmp", path.name) is not None


def unwritable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(
        f"cannot write to {folder}: {reason}; finished cells are kept - make room or choose"
        " another folder with --out, and run the same command again"
    )


def images_file(path: Path) -> Path:
    """Where the x' of the record at this path lies."""
    return path.with_suffix(".npz")


def images_digest(images: np.ndarray) -> str:
    """SHA-256 of the little-endian float32 pixels, whatever they are compressed with."""
    return hashlib.sha256(np.ascontiguousarray(images, dtype="<f4").data).hexdigest()


def _save_images(path: Path, images: np.ndarray) -> None:
    with path.open("wb") as file:  # NumPy would append .npz to a name
        np.savez_compressed(file, x=images)


def read_images(path: Path) -> np.ndarray:
    """x' from its file, float32; InputError for anything else."""
    try:
        with zipfile.ZipFile(path) as packed:  # it may come from a stranger
            if (size := packed.getinfo("x.npy").file_size) > LARGEST_IMAGES:
                raise ValueError(f"{size} bytes are not read")
        with np.load(path, allow_pickle=False) as stored:
            images: np.ndarray = stored["x"]
        if images.dtype != np.float32:
            raise ValueError(f"{images.dtype}, not float32")
        return images
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        problem = str(error) or type(error).__name__
        raise InputError(
            f"the images {path} are broken ({problem}); delete them, or run the cell again"
        ) from None


def read(path: Path) -> Record | None:
    """A record from its file; None for another schema version; damage is an InputError."""
    remedy = "it is left as it is; delete it to run the cell again"
    try:
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and data.get("schema_version") != SCHEMA:
            return None
        record = Record.model_validate(data)
    except OSError as error:
        raise InputError(f"cannot read the record {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        problem = problem_of(error)
        raise InputError(f"the record {path} is broken ({problem}); {remedy}") from None
    if record.id != record.cell.id:
        raise InputError(f"the record {path} is broken (its id is not that of its cell); {remedy}")
    return record


def _folder_name(text: str) -> str:
    """A spec as a portable folder name; only for people, the id in the file is what counts."""
    kept = "".join(sign if sign.isalnum() or sign in "-_.=&+" else "_" for sign in text)
    return kept[:80].strip("._") or "_"
