"""The README's code runs, and links in all documents lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_op_in_an_ordinary_loop() -> None:
    """The README's loop learns: its loss on a repeated batch falls."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    encoder, key_encoder = nn.Linear(48, 128), nn.Linear(48, 128)
    views = torch.randn(16, 48)
    scope = {
        "encoder": encoder,
        "key_encoder": key_encoder,
        "optimizer": torch.optim.SGD(encoder.parameters(), lr=0.5),
        "loader": [(views, views)] * 10,
    }
    losses = []
    watched = code.replace("result.loss.backward()", "result.loss.backward(); losses.append(result.loss.item())")
    assert watched != code
    exec(compile(watched, "README.md", "exec"), scope | {"losses": losses})
    assert len(losses) == 10 and losses[-1] < losses[0] - 1


DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "bench/README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(document: Path) -> set[str]:
    """Of the headings, as they are made where documents are shown: lower case, spaces as hyphens, no other signs."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
