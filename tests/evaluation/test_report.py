from __future__ import annotations

from cnclip_ft.evaluation.report import direction_line, display_width, markdown_table, plain_table, recall_table
from cnclip_ft.retrieval.recall import Direction, RetrievalScores

HALF = Direction({1: 50.0, 5: 75.0, 10: 100.0}, 1.5, 4, 4)


def test_chinese_names_stay_aligned():
    assert display_width("中文 ab") == 7
    lines = plain_table(["", "n"], [["中文", "1"], ["abcdef", "10"]]).split("\n")
    assert len({display_width(line) for line in lines}) == 1


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


def test_one_direction_as_a_sentence():
    assert direction_line("t2i", None) == "t2i: no ground truth"
    assert "R@1 50.0  R@5 75.0" in direction_line("t2i", HALF)
