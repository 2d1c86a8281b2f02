"""Image files as pixels: one decoder for all, and a tensor that decodes when it is used."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robbench.errors import InputError

MODES = ("L", "RGB", "1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr")  # Pillow's with 8 bits or less
LARGEST = 8 << 30  # bytes that an operation on undecoded images may decode at once
aten = torch.ops.aten


def is_image(name: str) -> bool:
    """Whether a file is to be read as an image, by its name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    # macOS leaves a hidden ._1.png beside every 1.png in its archives
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def decode(file: str, content: bytes) -> Image.Image:
    """An image in the mode L or RGB; alpha is dropped.

    InputError for what is broken, or has more than 8 bits a channel, which would be cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            if mode in MODES:
                return image.convert("L" if mode == "L" else "RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise InputError(f"{file} cannot be read as an image ({reason(error)})") from error
    raise InputError(f"{file} has the pixel format {mode}; need 8 bits a channel")


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 1 or 3)."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def reason(error: Exception) -> str:
    """An exception of a library in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class ImageFiles(Tensor):
    """Colour images of a folder as a float32 tensor (N, 3, H, W) in [0, 1] that takes no memory.

    Indexing and slicing the first dimension decode the images that they take; split and to(device)
    leave them undecoded. Every other operation decodes all of them, and is an InputError where
    that would take more than 8 GiB.
    """

    @staticmethod
    def __new__(
        cls,
        root: Path,
        files: Sequence[str],
        prepare: Callable[[Image.Image], Image.Image],
        size: tuple[int, int],
        device: torch.device | None = None,
    ) -> ImageFiles:
        """`files` are relative to root; `prepare` turns an RGB image into one of size (H, W)."""
        shape = (len(files), 3, *size)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)
        assert isinstance(made, ImageFiles)
        made.root, made.files, made.prepare = root, tuple(files), prepare
        return made

    root: Path
    files: tuple[str, ...]
    prepare: Callable[[Image.Image], Image.Image]

    def pick(self, ids: Tensor) -> ImageFiles:
        """The images of these ids, (n,) integers, undecoded."""
        return self._copy([self.files[i] for i in ids.tolist()], self.device)

    def listing(self) -> str:
        """Names and sizes in bytes, a line per file; InputError for a file that is gone."""
        try:
            sizes = [(self.root / file).stat().st_size for file in self.files]
        except OSError as error:
            raise InputError(f"{self.root} has changed while in use ({reason(error)})") from error
        return "".join(f"{file} {n}\n" for file, n in zip(self.files, sizes, strict=True))

    def decoded(self) -> Tensor:
        """All images as a plain tensor, on the same device."""
        if self.numel() * self.element_size() > LARGEST:
            raise InputError(
                f"{len(self)} images of {self.root} would take {self.numel() * 4 / 2**30:.0f} GiB"
                " as one tensor; take a part of them first, such as x[:1000]"
            )
        x = torch.empty(tuple(self.shape))
        for i, file in enumerate(self.files):
            x[i] = self._read(self.root / file)
        return x.to(self.device)

    def _read(self, file: Path) -> Tensor:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read ({reason(error)})") from error
        image = self.prepare(decode(str(file), content).convert("RGB"))
        height, width = self.shape[2:]
        if image.size != (width, height):
            raise InputError(
                f"{file} is {image.width} x {image.height}; need {width} x {height} pixels"
            )
        return torch.from_numpy(pixels(image).copy()).permute(2, 0, 1).to(torch.float32).div_(255)

    def _copy(self, files: Sequence[str], device: torch.device) -> ImageFiles:
        height, width = self.shape[2:]
        return ImageFiles(self.root, files, self.prepare, (height, width), device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ImageFiles({self.root}, shape={tuple(self.shape)}, device={self.device})"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        size = tuple(self.shape[2:])
        return ImageFiles, (self.root, self.files, self.prepare, size, self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options, x, rest = kwargs or {}, args[0], args[1:]
        if isinstance(x, ImageFiles):
            if func is aten._to_copy.default and options.get("dtype") in (None, x.dtype):
                return x._copy(x.files, options.get("device") or x.device)
            if (ids := _positions(func, len(x), rest)) is not None:
                parts = [x.pick(part.reshape(-1)) for part in ids]
                if func is aten.split.Tensor:
                    return parts
                return parts[0].decoded().reshape(*ids[0].shape, *x.shape[1:])
        whole = [_decoded(value) for value in args]
        return func(*whole, **{key: _decoded(value) for key, value in options.items()})


def _positions(function: Any, n: int, rest: Sequence[Any]) -> Sequence[Tensor] | None:
    """Which of n images an operation on the first dimension takes; None for any other operation."""
    every = torch.arange(n)
    if function is aten.index.Tensor and len(rest[0]) == 1:
        return [every[rest[0][0].cpu()]]
    taking = (aten.slice.Tensor, aten.select.int, aten.index_select.default)
    if function in taking and (not rest or rest[0] == 0):
        return [function(every, *(v.cpu() if isinstance(v, Tensor) else v for v in rest))]
    if function is aten.split.Tensor and (len(rest) == 1 or rest[1] == 0):
        return every.split(rest[0])
    return None


def _decoded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(item) for item in value)
    return value.decoded() if isinstance(value, ImageFiles) else value
