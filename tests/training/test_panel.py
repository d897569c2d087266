"""What is seen of a run: the panel, the lines, the curves."""

import io
import math
import re
import warnings

import pytest
from rich.console import Console

from surgery.errors import SurgeryError
from surgery.training.curves import curves, rewards_figure, series, smooth
from surgery.training.panel import BARS, ON_POLICY, Panel, duration, sparkline, watching
from surgery.training.recipe import make
from surgery.training.signs import TrainingWarning

METRICS = {"loss": 1e-9, "grad_norm": 0.5, "reward": 0.25, "reward/accuracy": 0.2, "reward/format": 1.0,
           "length": 12.0, "truncated": 0.125, "zero_variance": 0.5, "entropy": 0.7, "kl": 0.01,
           "tokens_per_second": 2100.0, "seconds": 2.0, "eval/accuracy": 0.5}  # fmt: skip
LABELS = ["grad norm", "reward", "accuracy", "format", "length", "truncated", "equal rewards", "entropy", "KL",
          "held out: accuracy", "tokens/s"]  # fmt: skip


def drawn(panel):
    console = Console(file=io.StringIO(), width=110)
    console.print(panel.render())
    return console.file.getvalue()


def fed(panel, steps=3):
    for step in range(1, steps + 1):
        panel(step, METRICS | {"reward": 0.25 * step})
    return panel


def test_the_panel_shows_every_number_with_its_course():
    text = drawn(fed(Panel(10, "grpo", rollouts=True)))
    assert "grpo" in text and "step 3 of 10" in text
    assert all(label in text for label in LABELS)
    assert re.search(r"reward +0.750 +▁▅█", text)
    assert "0:14 left" in text  # seven steps of two seconds
    assert "12%" in text and "2,100" in text


def test_the_loss_of_a_run_that_samples_says_that_zero_is_normal():
    assert ON_POLICY in drawn(fed(Panel(10, rollouts=True)))
    assert ON_POLICY not in drawn(fed(Panel(10)))


def test_a_panel_before_the_first_step_and_one_with_a_hole_can_be_drawn():
    assert "step 0 of 5" in drawn(Panel(5))
    panel = Panel(5)
    panel(1, {"loss": math.nan, "reward/x[1]": math.nan, "reward/[bold]": 1.0})
    assert re.search(r"x\[1\] +-", drawn(panel)) and "[bold]" in drawn(panel)


def test_a_lone_component_is_the_reward_and_not_told_twice():
    panel = Panel(5)
    panel(1, {"reward": 0.5, "reward/accuracy": 0.5})
    assert "accuracy" not in drawn(panel)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([0, 7], "▁█"), ([7, 0], "█▁"), ([2, 2, 2], "▁▁▁"), ([math.nan] * 2, "  "),
     ([0, math.nan, 7], "▁ █"), ([0, 0, 7, 7], "▁▁██")],
)  # fmt: skip
def test_sparklines(values, expected):
    assert sparkline(values) == expected


def test_a_long_course_is_means_of_its_parts():
    assert sparkline([0.0, 2.0] * 50 + [7.0] * 100, 2) == "▁█"
    assert len(sparkline(list(range(1000)))) == 24 and set(sparkline(list(range(1000)))) == set(BARS)


def test_durations():
    assert [duration(s) for s in (0, 75, 4000)] == ["0:00", "1:15", "1:06:40"]


def test_without_a_terminal_there_are_lines_every_few_seconds_and_the_last():
    stream = io.StringIO()
    with watching(make({"steps": 3}), stream=stream, every=1e9) as panel:
        fed(panel)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("step 3/3 · ") and "grad norm 0.5" in line and "2,100 tokens/s" in line
    assert "left" not in line
    stream = io.StringIO()
    with watching(make({"steps": 3}), stream=stream, every=0) as panel:
        fed(panel)
    assert len(stream.getvalue().splitlines()) == 3


def test_on_a_terminal_the_panel_is_live():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with watching(make({"steps": 3, "name": "mine"}), stream=stream) as panel:
        fed(panel)
        warnings.warn("short of breath", TrainingWarning, stacklevel=1)
    assert "mine" in stream.getvalue() and "short of breath" in stream.getvalue()


def test_warnings_of_training_are_told_there_and_others_go_their_way():
    stream = io.StringIO()
    with pytest.warns(DeprecationWarning) as others, watching(make({"steps": 3}), stream=stream) as panel:
        warnings.warn("short of breath", TrainingWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert panel.warnings == ["short of breath"] and stream.getvalue() == "note: short of breath\n"
    assert [str(w.message) for w in others] == ["old"]


# ---- curves --------------------------------------------------------------------------------------------------------


def run(steps):
    lines = [{"step": 0, "eval/accuracy": 0.1}]
    return lines + [{"step": s, **METRICS, "reward": s / 10, "loss": math.nan if s == 2 else 0.0} for s in
                    range(1, steps + 1)]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 8, 60])
def test_curves_have_a_panel_for_each_kind_of_number(steps):
    figure = curves(run(steps))
    shown = [axis.get_title("left") for axis in figure.axes if axis.get_visible()]
    assert shown[0] == "accuracy, held out" and len(shown) == 8  # all but the likelihood
    accuracy = figure.axes[0].lines[-1]
    assert accuracy.get_xdata()[0] == 0 and accuracy.get_ydata()[0] == pytest.approx(0.1 if steps < 30 else 0.3)
    reward = figure.axes[shown.index("reward")]
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["total", "accuracy", "format"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in reward.lines}) == 3  # apart without colour
    for line in reward.lines:
        assert len(set(_rgb(line.get_color()))) == 1  # black and white


def test_curves_of_a_folder_and_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "nll": null}\n{"step": 2, "loss": 0.5}\n')
    figure = curves(tmp_path)
    assert [axis.get_title("left") for axis in figure.axes] == ["loss"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 0.5]
    with pytest.raises(SurgeryError, match="no steps"):
        curves([])


def test_a_lone_component_is_drawn_once():
    lines = [{"step": s, "reward": s / 3, "reward/accuracy": s / 3} for s in range(3)]
    assert list(series(lines, ("reward", "reward/*"))) == ["accuracy"]


def test_running_means():
    assert smooth([1, 2, 3, 4], 1) == [1, 2, 3, 4]
    assert smooth([1, 2, 3, 4], 3) == [1.5, 2, 3, 3.5]


def test_the_figure_of_rewards_has_a_column_for_each():
    from surgery.training.rewards.audit import Line, summarise

    lines = [Line("p", "c", i, {"a": i / 10, "b": None, "total": float(i % 2)}, step=1 + i // 6) for i in range(12)]
    figure = rewards_figure(summarise(lines))
    assert [axis.get_title("left") for axis in figure.axes[:2]] == ["a", "total"]
    assert "r = 1.00" in figure.axes[2].get_title("left")
    one = rewards_figure(summarise(lines[:6]))
    assert "number of completions" in one.axes[0].get_xlabel()
    with pytest.raises(SurgeryError, match="No reward"):
        rewards_figure(summarise([Line("p", "c", 1, {"a": None})]))


def _rgb(color):
    from matplotlib.colors import to_rgb

    return to_rgb(color)
