"""Inside the claim about entity tracking."""

import json

from claims import EXPERIMENTS, RESULTS

README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines()
EXPERIMENT = "entity_tracking"


def test_the_readme_quotes_the_stored_and_the_published_results(experiment):
    report = json.loads((RESULTS / f"{EXPERIMENT}.json").read_text())
    lines = [*experiment.markdown(report["summary"]).splitlines(), *experiment.published().splitlines()]
    assert len(lines) == 2 + 2 + 4 + 2 + 2 + 6
    assert [line for line in lines if line not in README] == []


def test_published_recoveries_are_those_of_the_accuracies(experiment):
    assert "| CMAP from Goat into Llama: recovery | circuit 1.0 | A 1.0 | B 0.75 | C -0.25, D -0.06 |" in (
        experiment.published().splitlines()
    )


def test_stories_are_consistent(experiment):
    from random import Random

    for seed in range(50):
        row = experiment.story(Random(seed), moves=2)
        asked = row["names"][row["asked"]]
        last = [fact for fact in row["prompt"][2:].split("where")[0].split(";") if fact.startswith(f"{asked} ")][-1]
        assert last.endswith(row["answer"]) and row["prompt"].count(" to ") == 2 and f"where {asked}=#" in row["prompt"]
