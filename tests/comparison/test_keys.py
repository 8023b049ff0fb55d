"""Every key of a comparison changes the grid, who computes it, or what its report says."""

import sys
from pathlib import Path

import pytest
import yaml

from medi3d import cli
from medi3d.comparison import compare, executor
from medi3d.comparison.config import load_comparison
from medi3d.comparison.grid import Grid
from medi3d.comparison.settings import Comparison
from medi3d.errors import ConfigError
from tests.comparison.test_compare import GRID
from tests.keys import Change, changed_keys, keys_of
from tests.tiny import CONFIG

OTHER = "budgets.long={steps: 9}"
SEARCHED = ["search.rates=[0.1, 0.01]", OTHER]


class Bench:
    """A comparison under test."""

    def __init__(self, cohort: Path, folder: Path, overrides, monkeypatch):
        self.folder, self.overrides, self.monkeypatch = folder, overrides, monkeypatch
        folder.mkdir()
        self.config = folder / "compare.yaml"
        base = yaml.safe_load(CONFIG.format(root=cohort))
        self.config.write_text(yaml.safe_dump(GRID | {"base": base}))

    @property
    def loaded(self):
        return load_comparison(self.config, self.overrides)

    @property
    def grid(self):
        return Grid(*self.loaded, self.folder / "grid")


def cells(bench):
    """Each point of the grid, and what its result follows from."""
    return {point: cell.digest for point, cell in bench.grid.cells({}).items()}


def searched(bench):
    return {key: cell.digest for key, cell in bench.grid.search_cells().items()}


def references(bench):
    return {point: bench.grid.reference_of(point) for point in bench.grid.cells({})}


def command(bench):
    """Folder and executor that `medi3d compare` takes."""
    seen = []

    def take(*arguments, **options):
        seen.append(arguments)
        raise ConfigError("seen")

    with bench.monkeypatch.context() as patch:
        patch.setattr(executor, "create_executor", lambda *given: given)
        patch.setattr(compare, "run_comparison", take)
        patch.setattr(sys, "argv", ["medi3d", "compare", str(bench.config), *bench.overrides])
        with pytest.raises(SystemExit):
            cli.main()
    return seen[0][2:]


def page(bench):
    """The report of a comparison of which no run is done."""
    folder = bench.folder / "compared"
    compare.run_comparison(*bench.loaded, folder, lambda cells, folder: iter(()))
    return (folder / "report.html").read_text().partition("<h2")[0]


KEYS = {
    "Comparison.name": Change("name=another", command),
    "Comparison.base": Change("base.training.batch_size=1", cells),
    "Comparison.groups": Change("groups.again={reference: a, arms: {a: {}}}", cells),
    "Comparison.budgets": Change(OTHER, cells),
    "Comparison.changes": Change("changes.training.batch_size=1", cells),
    "Comparison.sizes": Change("sizes=[1]", cells),
    "Comparison.strategies": Change("strategies=[full]", cells),
    "Comparison.seeds": Change("seeds=[5]", cells),
    "Comparison.folds": Change("folds=4", cells),
    "Comparison.tuning_cases": Change("tuning_cases=2", cells),
    "Comparison.threads": Change("threads=2", cells),
    "Comparison.gpus": Change("gpus=0.5", command),
    "Comparison.notice": Change("notice=virtual", page),
    "GroupSettings.reference": Change("groups.unet.reference=wide", references),
    "GroupSettings.arms": Change("groups.unet.arms.wide.network.decoder_channels=[4,4,4]", cells),
    "GroupSettings.changes": Change("groups.unet.changes.training.batch_size=1", cells),
    "GroupSettings.sizes": Change("groups.unet.sizes=[1]", cells),
    "GroupSettings.strategies": Change("groups.unet.strategies=[full]", cells),
    "GroupSettings.budgets": Change("groups.unet.budgets=[long]", cells, [OTHER]),
    "SearchSettings.rates": Change("search.rates=[0.1]", searched),
    "SearchSettings.size": Change("search.size=2", searched, SEARCHED),
    "SearchSettings.budget": Change("search.budget=long", searched, SEARCHED),
}


@pytest.mark.parametrize("key", sorted(set(keys_of(Comparison)) | set(KEYS)))
def test_a_key_changes_what_it_configures(key, cohort, tmp_path, monkeypatch):
    assert key in KEYS, f"say in KEYS what {key} changes"
    assert key in keys_of(Comparison), f"{key} is gone"
    change = KEYS[key]
    without = Bench(cohort, tmp_path / "without", [*change.base], monkeypatch)
    changed = Bench(cohort, tmp_path / "changed", [*change.base, change.override], monkeypatch)
    assert changed_keys(without.loaded[0], changed.loaded[0]) == {key.rpartition(".")[2]}
    assert change.look(without) != change.look(changed)
