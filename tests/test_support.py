"""The support page is what running a tiny model of every family gives."""

import pytest
import transformers
from steerlens.evals import support
from steerlens.evals.families import families, vision

LINES = support.PAGE.read_text(encoding="utf-8").splitlines()
current = pytest.mark.skipif(
    transformers.__version__ not in "\n".join(LINES),
    reason=f"the support page is of another transformers than {transformers.__version__}",
)


@current
@pytest.mark.parametrize("family", [*families(), *vision()])
def test_a_family_is_what_the_page_says(family):
    """If this fails after an upgrade of transformers: `python -m steerlens.evals.support`, and look at what changed."""
    assert support.row(family).line() in LINES


@current
def test_the_page_lists_every_family_and_no_other():
    rows = [support.Row(*(cell.strip() for cell in line.split("|")[1:-1])) for line in LINES if line.startswith("| ")]
    rows = rows[1:]
    assert [row.family for row in rows] == [*families(), *vision()]
    assert support.page(rows).splitlines() == LINES
    assert {row.tier for row in rows} == {"tested", "self-check", "refused", "not built"}
