"""The list of image files of a data set: found once, sorted, and identified by a digest."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from synco_fast.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
HELD_OUT_SPLITS = ("val", "test")
_LAYOUTS = (
    "expected <split>/<class>/* or <class>/* with images in class folders, a flat folder of images, "
    "or a text file listing one image per line"
)


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split.

    Attributes:
        root: folder the files are relative to.
        files: paths relative to root, forward slashes; `scan` and `held_out` return them sorted.
        labels: (n,) int64 class numbers, or None when unlabelled.
        classes: class names by number; empty when unlabelled.
        digest: SHA-256 over files and labels. The same digest means the same samples in the same order.
    """

    root: Path
    files: tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        if self.labels is not None:
            content.update(b"\0" + self.labels.numpy().astype("<i8").tobytes())
        object.__setattr__(self, "digest", content.hexdigest())

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> Path:
        """Full path of sample i."""
        return self.root / self.files[i]

    def take(self, indices: Sequence[int]) -> "Index":
        """The given samples in the given order."""
        labels = None if self.labels is None else self.labels[torch.as_tensor(indices, dtype=torch.int64)]
        return Index(self.root, tuple(self.files[i] for i in indices), labels, self.classes)


def scan(root: Path, split: str = "train") -> Index:
    """Find the images of a split.

    Args:
        root: one of
            - a text file: one path per line, relative to the file's own folder, with an optional class number
              after a tab (on every line or on none);
            - a folder holding `<split>/`, which is then looked at instead of the folder itself;
            - a folder of class folders of images;
            - a flat folder of images: no labels.
        split: name of the split folder to prefer.

    Raises:
        UserError: nothing usable there; the message says what was found.
    """
    root = Path(root)
    if root.is_file():
        return _scan_list(root)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; {_LAYOUTS}")
    if (root / split).is_dir():
        return _scan_folder(root / split)
    others = [name for name in ("train", *HELD_OUT_SPLITS) if (root / name).is_dir()]
    if others:
        raise UserError(
            f"data folder {root} has {', '.join(name + '/' for name in others)} but no {split}/; "
            f"add {split}/ or name the folder to use, for example {root / others[0]}"
        )
    return _scan_folder(root)


def held_out(root: Path) -> Index | None:
    """The held-out split, `val/` or else `test/` in root, or beside it if it is a list; None where there is neither."""
    root = Path(root)
    root = root.parent if root.is_file() else root
    for split in HELD_OUT_SPLITS:
        if (root / split).is_dir():
            return _scan_folder(root / split)
    return None


def _scan_folder(folder: Path) -> Index:
    images, others, subfolders = _list_folder(folder)
    in_classes = [(name, *_list_folder(folder / name)) for name in sorted(subfolders)]
    by_class = {name: inner for name, inner, _, _ in in_classes if inner}
    if images and by_class:
        raise UserError(
            f"data folder {folder} holds both images ({images[0]}, ...) and folders of images "
            f"({next(iter(by_class))}/, ...), so it is unclear whether they are classes; keep one of the two"
        )
    if images:
        return Index(folder, tuple(sorted(images)), None, ())
    if not by_class:
        skipped = others + [f"{name}/{file}" for name, _, inner, _ in in_classes for file in inner]
        skipped += [f"{name}/{inner}/" for name, _, _, deeper in in_classes for inner in deeper]
        raise UserError(_no_images(folder, skipped or [f"{name}/" for name in subfolders]))
    pairs = sorted((f"{name}/{file}", label) for label, (name, files) in enumerate(by_class.items()) for file in files)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Index(folder, tuple(file for file, _ in pairs), labels, tuple(by_class))


def _list_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the images, of the other files and of the folders in a folder; hidden ones are left out."""
    images: list[str] = []
    others: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append(entry.name)
                else:
                    others.append(entry.name)
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.strerror}") from error
    return images, others, folders


def _no_images(folder: Path, found: list[str]) -> str:
    if not found:
        return f"data folder {folder} is empty; {_LAYOUTS}"
    return (
        f"data folder {folder} holds no images where they are looked for; found {_examples(found)}; "
        f"image names end in {' '.join(IMAGE_SUFFIXES)}; {_LAYOUTS}"
    )


def _examples(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _scan_list(listing: Path) -> Index:
    if listing.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{listing} is a single image; {_LAYOUTS}")
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"file list {listing} is not UTF-8 text; {_LAYOUTS}") from error
    except OSError as error:
        raise UserError(f"file list {listing} cannot be read: {error.strerror}") from error
    pairs = sorted(
        (_parse_line(listing, number, line) for number, line in enumerate(lines, 1) if line.strip()),
        key=lambda pair: pair[0],
    )
    if not pairs:
        raise UserError(f"file list {listing} names no files; {_LAYOUTS}")
    files = tuple(file for file, _ in pairs)
    labels = [label for _, label in pairs if label is not None]
    if labels and len(labels) != len(files):
        raise UserError(f"file list {listing} labels {len(labels)} of {len(files)} files; label all or none")
    duplicates = [file for file, following in itertools.pairwise(files) if file == following]
    if duplicates:
        raise UserError(f"file list {listing} names files more than once: {_examples(duplicates)}")
    missing = [file for file in files if not (listing.parent / file).is_file()]
    if missing:
        raise UserError(
            f"file list {listing} names {len(missing)} files that do not exist: {_examples(missing)}; "
            f"paths are relative to {listing.parent}"
        )
    classes = _class_names(files, labels) if labels else ()
    return Index(listing.parent, files, torch.tensor(labels, dtype=torch.int64) if labels else None, classes)


def _class_names(files: Sequence[str], labels: Sequence[int]) -> tuple[str, ...]:
    """By number: the names of the folders, where every class has its own, or else the numbers."""
    folders = {(label, file.rpartition("/")[0]) for file, label in zip(files, labels, strict=True)}
    names = {label: folder.rpartition("/")[2] for label, folder in folders}
    if len(folders) == len(names) == len(set(names.values()) - {""}) == max(names) + 1:
        return tuple(names[number] for number in range(len(names)))
    return tuple(str(number) for number in range(max(names) + 1))


def _parse_line(listing: Path, number: int, line: str) -> tuple[str, int | None]:
    """One line of a file list to (normalised relative path, label or None)."""
    name, tab, label = line.partition("\t")
    path = PurePosixPath(os.path.normpath(name.strip()))
    where = f"file list {listing} line {number}"
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise UserError(f"{where}: {name} lies outside {listing.parent}; paths are relative to that folder")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{where}: {name} is not an image name; they end in {' '.join(IMAGE_SUFFIXES)}")
    if not tab:
        return str(path), None
    if not (label.strip().isascii() and label.strip().isdigit()):
        raise UserError(f"{where}: label {label!r} is not a class number (0, 1, 2, ...)")
    return str(path), int(label)
