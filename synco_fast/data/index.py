"""Finding the images of a data set: image folders, shards or lists, sorted and identified by a digest."""

import os
from pathlib import Path

import torch

from synco_fast.data.listing import read_list
from synco_fast.data.samples import IMAGE_SUFFIXES, LAYOUTS, examples
from synco_fast.data.samples import Index as Index
from synco_fast.data.shards import INDEX_NAME, by_split, is_compressed, is_shard, scan_shards
from synco_fast.errors import UserError

HELD_OUT_SPLITS = ("val", "test")


def scan(root: Path, split: str = "train") -> Index:
    """Find the images of a split.

    Args:
        root: one of
            - a folder holding `<split>/`, which is then looked at instead of the folder itself;
            - a folder of class folders of images;
            - a flat folder of images: no labels;
            - a folder of WebDataset shards (*.tar) or of TFRecord files (*.tfrecord, *-00000-of-01024), see
              `scan_shards`. With a list called `INDEX_NAME` beside them, that is read and they are not. Of shards whose
              names speak of several splits, as train-00000-of-01024, those of the split;
            - one such shard;
            - a text file: see `read_list`.
        split: name of the split to prefer.

    Raises:
        UserError: nothing usable there; the message says what was found.
    """
    root = Path(root)
    if root.is_file():
        return _scan_file(root)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; {LAYOUTS}")
    found = splits(root)
    if split in found:
        return _scan_split(root, split)
    if found:
        raise UserError(
            f"data folder {root} has {', '.join(name + '/' for name in found)} but no {split}/; "
            f"add {split}/ or name the folder to use, for example {root / found[0]}"
        )
    return _scan_folder(root)


def held_out(root: Path) -> Index | None:
    """The held-out split, `val` or else `test`: in a folder, or beside a list or what it lists. None: no such."""
    root = Path(root)
    for folder in (root,) if root.is_dir() else (root.parent, scan(root).root.parent):
        found = splits(folder) if folder.is_dir() else []
        for split in HELD_OUT_SPLITS:
            if split in found:
                return _scan_split(folder, split)
    return None


def splits(root: Path) -> list[str]:
    """Which of train, val and test a folder has: as folders or else as shards named so."""
    names = ("train", *HELD_OUT_SPLITS)
    folders = [name for name in names if (root / name).is_dir()]
    if folders:
        return folders
    shards = by_split(root, [name for name in _list_folder(root)[1] if is_shard(name)])
    return [name for name in names if name in shards]


def _scan_split(root: Path, split: str) -> Index:
    if (root / split).is_dir():
        return _scan_folder(root / split)
    return scan_shards(root, by_split(root, [name for name in _list_folder(root)[1] if is_shard(name)])[split])


def _scan_file(path: Path) -> Index:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{path} is a single image; {LAYOUTS}")
    if is_compressed(path.name):
        raise UserError(_compressed(path))
    return scan_shards(path.parent, [path.name]) if is_shard(path.name) else read_list(path)


def _scan_folder(folder: Path) -> Index:
    images, others, subfolders = _list_folder(folder)
    in_classes = [(name, *_list_folder(folder / name)) for name in sorted(subfolders)]
    by_class = {name: inner for name, inner, _, _ in in_classes if inner}
    shards = [name for name in others if is_shard(name)]
    kinds = {"images": images, "folders of images": [f"{name}/" for name in by_class], "shards": shards}
    found = [f"{kind} ({names[0]}, ...)" for kind, names in kinds.items() if names]
    if len(found) > 1:
        raise UserError(
            f"data folder {folder} holds both {' and '.join(found)}, so it is unclear which are the data set and "
            "whether folders are classes; keep one of them"
        )
    if shards:
        return _scan_shard_folder(folder, others)
    if images:
        return Index(folder, tuple(sorted(images)), None, ())
    if not by_class:
        for name in filter(is_compressed, others):
            raise UserError(_compressed(folder / name))
        skipped = others + [f"{name}/{file}" for name, _, inner, _ in in_classes for file in inner]
        skipped += [f"{name}/{inner}/" for name, _, _, deeper in in_classes for inner in deeper]
        raise UserError(_no_images(folder, skipped or [f"{name}/" for name in subfolders]))
    pairs = sorted((f"{name}/{file}", label) for label, (name, files) in enumerate(by_class.items()) for file in files)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Index(folder, tuple(file for file, _ in pairs), labels, tuple(by_class))


def _scan_shard_folder(folder: Path, files: list[str]) -> Index:
    for name in filter(is_compressed, files):
        raise UserError(_compressed(folder / name))
    shards = sorted(filter(is_shard, files))
    if INDEX_NAME not in files:
        return scan_shards(folder, shards)
    index = read_list(folder / INDEX_NAME)
    unlisted = sorted({folder / name for name in shards} - {shard.path for shard in index.shards})
    if unlisted:
        raise UserError(
            f"{folder / INDEX_NAME} does not list {len(unlisted)} shards beside it: "
            f"{examples([path.name for path in unlisted])}; remove it to have them all read, or remove them"
        )
    return index


def _compressed(path: Path) -> str:
    return f"{path} is compressed, so its images cannot be read one by one; decompress it"


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
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                    images.append(entry.name)
                else:
                    others.append(entry.name)
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.strerror}") from error
    return images, others, folders


def _no_images(folder: Path, found: list[str]) -> str:
    if not found:
        return f"data folder {folder} is empty; {LAYOUTS}"
    return (
        f"data folder {folder} holds no images where they are looked for; found {examples(found)}; "
        f"image names end in {' '.join(IMAGE_SUFFIXES)}; {LAYOUTS}"
    )
