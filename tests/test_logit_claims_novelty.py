"""Inside the claims about contrastive exploration."""

import pytest

EXPERIMENT = "new_in_my_data"


def test_pages_of_the_new_tasks_are_recognised_and_old_ones_are_not(experiment):
    old = experiment.Pages(1, 0.0, 48)
    assert not [row for row in map(old.row, range(400)) if experiment.domain(row["completion"]) is not None]
    new = experiment.Pages(1, 1.0, 48)
    rows = [new.row(i) for i in range(400)]
    assert {row["task"] for row in rows} == set(experiment.FORMS) and {len(row["completion"]) for row in rows} == {48}
    wrong = [row for row in rows if experiment.domain(row["completion"]) != row["task"]]
    assert len(wrong) < 8 and {row["task"] for row in wrong} <= {"addition"}, "cut before the sum is written"
    assert new.row(7) == rows[7] == experiment.Pages(1, 1.0, 48).row(7)


def test_a_share_of_the_pages_is_new(experiment):
    pages = experiment.Pages(2, 0.05, 48)
    tasks = [pages.row(i)["task"] for i in range(2000)]
    assert 70 < sum(task in experiment.FORMS for task in tasks) < 130


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("q bada=#ku q mo", "kv"),
        ("m 1+1=#2 w abc=#aabbcc", "double"),
        ("w abc=#aabbc", None),
        ("l abc=#ccc l ab", "last"),
        ("l abc=#cca", None),
        ("k 2 6 8;0=#8-6-2 q bada=#ku q tode=#le", "kv"),
        ("a 61+11=1+1=2;6+1=7;#72", "addition"),
        ("m 3+5-2=3+5=8;8-2=6;#6", None),
    ],
)
def test_a_text_is_in_the_domain_of_most_whole_examples(experiment, text, name):
    assert experiment.domain(text) == name
