"""One file of a run that was stopped, cut or changed at a random place; and what becomes of the run that goes on."""

import random
import shutil
from pathlib import Path

from tests.command import Finished, call, check_error, contents
from tests.conftest import SYNCO_FAST, TINY, write_images
from tests.engine.runs import differences, final_state, pretrain_command, rows
from tests.formats import write_tar

STOP, END = 8, 12
HOW = ("cut", "changed in a byte")


class Scene:
    """A run on a tar shard that was stopped after STOP of its END steps, and the same one that was not.

    Args:
        folder: for all of it; not there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._shard = folder, folder / "data" / "x.tar"
        write_images(folder / "images", 100, seed=0)
        self._shard.parent.mkdir()
        write_tar(self._shard, [(path.name, path.read_bytes()) for path in sorted((folder / "images").iterdir())])
        self._tar = self._shard.read_bytes()
        (folder / "tiny.yaml").write_text(TINY)
        for name, most in (("whole", END), ("stopped", STOP)):
            done = self._go_on(folder / name, most)
            assert done.code == 0, done.err

    def checkpoint(self, how: str, number: int) -> str:
        """Damage the newest checkpoint, go on, and say what happened; everything ends as if nothing had been."""
        output = self._again()
        newest = output / "checkpoints" / f"step-{STOP:08d}.pt"
        newest.write_bytes(_damaged(newest.read_bytes(), how, number))
        done = self._go_on(output)
        assert done.code == 0, done.err
        assert self._same_state(output) and rows(output) == rows(self._folder / "whole")
        if f"Going on from the one before, {newest.with_stem('step-00000006')}" in done.err:
            return "told; went on from the one before; the same bits at the end"
        assert "warning" not in done.err and f"step {STOP}/" not in done.err, done.err
        return "the damage is in no content; went on from it; the same bits at the end"

    def metrics(self, how: str, number: int) -> str:
        """The same of metrics.jsonl. What it had lost is lost, and no more."""
        output = self._again()
        path = output / "metrics.jsonl"
        damaged = _damaged(path.read_bytes(), how, number)
        path.write_bytes(damaged)
        done = self._go_on(output)
        assert done.code == 0 and self._same_state(output), done.err
        expected, found = rows(self._folder / "whole"), rows(output)
        lost = len(expected) - len(found)
        if lost:
            assert f"{lost} of the {STOP} rows up to step {STOP} are damaged or gone" in done.err, done.err
            assert path.with_suffix(".damaged.jsonl").read_bytes() == damaged
            assert lost <= STOP if how == "cut" else lost <= 2, "an end of a row is a byte of two"
            assert all(row in expected for row in found)
            return f"told; {'the rows behind the cut are' if how == 'cut' else 'one damaged row is'} lost, no other"
        changed = sum(row not in expected for row in found)
        assert changed <= (how != "cut"), "rows that nobody changed"
        return "a row has another name or number, which nobody can tell" if changed else "no row lost"

    def shard(self, how: str, number: int) -> str:
        """The same of the data. A run that refuses it touches nothing, and goes on once the data is whole again."""
        output = self._again()
        before = contents(output / "checkpoints")
        self._shard.write_bytes(_damaged(self._tar, how, number))
        done = self._go_on(output)
        self._shard.write_bytes(self._tar)
        if done.code == 0:
            same = self._same_state(output)
            return f"not told; {'the damage is in no image' if same else 'an image has other pixels'}"
        assert "Traceback" not in done.err and ("x.tar" in done.err or ".jpg" in done.err), done.err
        refused = contents(output / "checkpoints") == before
        done = self._go_on(output)
        assert done.code == 0 and self._same_state(output) and rows(output) == rows(self._folder / "whole"), done.err
        return f"told, {'and refused' if refused else 'when it came to it'}; went on once it was mended; the same bits"

    def _again(self) -> Path:
        """A copy of the run that was stopped."""
        output = self._folder / "again"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(self._folder / "stopped", output, symlinks=True)
        return output

    def _go_on(self, output: Path, most: int = END) -> Finished:
        settings = (f"trainer.max_steps={most}", "checkpoint.every_steps=3", "trainer.epochs=2")
        command = pretrain_command(self._folder / "tiny.yaml", self._shard.parent, output, settings=settings)
        done = call(*command[len(SYNCO_FAST) :])
        if done.code != 0:
            check_error(done.code, done.err.splitlines()[-1], ())
        return done

    def _same_state(self, output: Path) -> bool:
        found, expected = final_state(output), final_state(self._folder / "whole")
        for side in (found, expected):
            del side["rows"]  # of a file that may have lost some
        return differences(found, expected) == []


def _damaged(content: bytes, how: str, number: int) -> bytes:
    pick = random.Random(number)
    at = pick.randrange(len(content))
    return (
        content[:at]
        if how == "cut"
        else content[:at] + bytes([content[at] ^ pick.randrange(1, 256)]) + content[at + 1 :]
    )
