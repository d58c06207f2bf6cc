"""The table of recall: dashes, languages, bars in names."""

from __future__ import annotations

from cnclip_ft.evaluation.results.recall_table import markdown_table, recall_table
from cnclip_ft.retrieval.recall import Direction, RetrievalScores

HALF = Direction({1: 50.0, 5: 75.0, 10: 100.0}, 1.5, 4, 4)


def test_a_direction_without_truth_is_a_dash():
    table = recall_table({"valid": RetrievalScores(HALF, None)})
    row = table.split("\n")[2].split()
    assert row == ["valid", "50.0", "75.0", "100.0", "–", "–", "–", "75.0", "1.5", "–"]


def test_languages_stand_below_their_split():
    scores = RetrievalScores(HALF, HALF, by_language={"en": RetrievalScores(HALF, None)})
    lines = recall_table({"valid": scores}, markdown=True).split("\n")
    assert lines[2].startswith("| valid |") and "valid · en" in lines[3]


def test_bars_in_names_do_not_break_markdown():
    assert markdown_table(["", "n"], [["a|b", "1"]]).split("\n")[2] == "| a\\|b | 1 |"
