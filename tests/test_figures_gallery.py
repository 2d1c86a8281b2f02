"""Figures as they are kept: when they are drawn, when they are doubted, what they are made of."""

from __future__ import annotations

import pytest
import torch

from robbench import figures
from robbench.datasets import load as dataset
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import Drawing
from robbench.judge import Violation
from robbench.papers import ledger
from robbench.papers.reproduction import Known
from robbench.reproducing import part_of
from robbench.runner import Shared
from robbench.training import Diverged

NOTHING = Known.of([], 1)
FAILURES = [Diverged("the loss is nan"), Violation("the attack left the box"), InputError("no")]


@pytest.fixture
def part(tmp_path):
    return part_of("ito:figure4_left", "smoke", tmp_path, dataset)


@pytest.fixture
def drawn(part, monkeypatch):
    """What the records say of a figure, to be changed, and it drawn from that."""
    said = {"rows": [{"series": "a", "x": 1, "y": 2.5}], "error": None}

    def plot(rows, arguments):
        if said["error"]:
            raise said["error"]
        made, axis = figures.canvas()
        axis.plot([float(row["x"]) for row in rows], [float(row["y"]) for row in rows], "o")
        return made

    bindings = figures.drawings.get("members-by-draws").bindings
    drawing = Drawing(lambda sources, arguments: said["rows"], plot, bindings)
    monkeypatch.setitem(figures.drawings._entries, "members-by-draws", drawing)
    assert draw(part) == [] == part.doubts(NOTHING)
    return said


def draw(part):
    return part.figures.draw(Shared(part.out, None, torch.device("cpu")), NOTHING)


def test_a_figure_older_than_its_records_is_stale_until_it_is_drawn(part, drawn):
    drawn["rows"] = [{"series": "a", "x": 1, "y": 3.5}]
    (line,) = part.doubts(NOTHING)
    assert "figure4_left.smoke.csv is stale, the records say otherwise" in line
    assert line.endswith("run 'robbench reproduce ito:figure4_left --scale smoke'")
    assert draw(part) == [] == part.doubts(NOTHING)


@pytest.mark.parametrize("kind", [".svg", ".png"])
def test_a_plot_of_older_data_is_named(part, drawn, kind):
    data = part.figures.data_of("figure4_left")
    plot = data.with_suffix(kind)
    older = plot.read_bytes()
    drawn["rows"] = [{"series": "a", "x": 1, "y": 3.5}]
    draw(part)
    plot.write_bytes(older)
    (line,) = part.doubts(NOTHING)
    assert line.startswith(f"{plot}: it was not drawn from figure4_left.smoke.csv")


def test_a_plot_that_fails_leaves_no_old_one_unnoticed(part, drawn):
    drawn |= {"rows": [{"series": "a", "x": 1, "y": 3.5}], "error": RuntimeError("out of memory")}
    (line,) = draw(part)
    assert line.startswith("figure4_left is not drawn: RuntimeError: out of memory")
    (line,) = part.doubts(NOTHING)
    assert "it was not drawn from" in line


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_fails_for_one_figure_keeps_no_other_from_being_drawn(tmp_path, monkeypatch, error):
    def fail(sources, arguments):
        raise error

    toy = figures.drawings.get("mmc-toy")._replace(data=fail)
    monkeypatch.setitem(figures.drawings._entries, "mmc-toy", toy)
    part = part_of("pang", "smoke", tmp_path, dataset)
    names = ("fig_toy_convergence", "fig_mmd")
    part.figures.asked = {name: part.figures.every[name] for name in names}
    (line,) = draw(part)
    assert line.startswith("fig_toy_convergence is not drawn: ") and str(error) in line
    assert part.figures.drawn() == ["fig_mmd"]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_fails_for_one_cost_is_a_line(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(ledger, "measure_cost", fail)
    part = part_of("sdr:claims", "smoke", tmp_path, dataset)
    lines = part.measure_costs(Shared(tmp_path, None, torch.device("cpu")))
    assert len(lines) == len(part.costs.every) and all(str(error) in line for line in lines)


@pytest.mark.parametrize(
    ("name", "defense"), [("fig_mmd", "mmc-rand"), ("fig_toy_convergence", "center-loss")]
)
def test_data_is_of_the_versions_of_the_defenses_it_is_computed_with(
    tmp_path, monkeypatch, name, defense
):
    part = part_of(f"pang:{name}", "smoke", tmp_path, dataset)
    figure = part.figures.asked[name]
    small = {"points": 60, "batches": [60], "steps": 4} if "toy" in name else {"draws": 2}
    part.figures.every[name] = figure.model_copy(update={"arguments": small})
    part.figures.asked[name] = part.figures.every[name]
    assert draw(part) == [] == part.doubts(NOTHING)
    monkeypatch.setattr(type(resolve(defense)[0]), "version", 99)
    assert f"{defense} has another version" in " ".join(part.doubts(NOTHING))


def test_a_figure_says_what_it_was_measured_on_and_not_what_the_paper_names(tmp_path):
    figures_of_ito = part_of("ito", "cpu", tmp_path, dataset_named).figures
    grounds = figures_of_ito.grounds("figure2")
    assert {(name, n) for name, _, n in grounds} == {("digits", "500")}
    assert [n for *_, n in figures_of_ito.grounds("figure1")] == ["", ""]
    assert figures_of_ito._measured_on("figure2") == (
        "scale cpu: digits · 3 × quick(width=12); quick(width=12) · draws: 3 · n = 500"
        " · epochs: 20 + 8; 20"
    )
    pang = part_of("pang", "cpu", tmp_path, dataset_named).figures
    assert pang.grounds("fig_contours") == [] and pang._measured_on("fig_contours") == ""


def dataset_named(name):
    """Any dataset, of which digits have the images."""
    return dataset("digits")
