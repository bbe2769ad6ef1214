"""Who won, by how much, in which words."""

import pytest
from races import short_race

from quadric.lab.standings import columns, number, standings, verdict


def said(race):
    return verdict(race, standings(race))


class TestNumbers:
    def test_mean_and_sample_deviation_over_seeds(self):
        best, other = standings(short_race({"A": (True, [90.0, 92.0, 94.0]), "B": (False, [95.0, 95.0, 95.0])}))
        assert (best.name, best.metric.mean, best.metric.std) == ("B", 95.0, 0.0)
        assert (other.metric.mean, other.metric.std, other.metric.count) == (92.0, 2.0, 3)

    def test_a_single_seed_has_no_deviation(self):
        race = short_race({"A": (True, [90.0]), "B": (False, [91.0])})
        assert [s.metric.std for s in standings(race)] == [None, None]
        assert columns(race, standings(race))[3].cells == ["91.00", "90.00"]

    def test_lower_is_better_turns_the_order(self):
        race = short_race({"A": (True, [2.0]), "B": (False, [1.0]), "C": (False, [3.0])}, higher=False, unit="")
        assert [s.name for s in standings(race)] == ["B", "A", "C"]

    def test_lost_seeds_count_in_nothing_and_send_their_optimizer_back(self):
        race = short_race({"A": (True, [99.0, None, 97.0]), "B": (False, [80.0, 82.0, 84.0])}, times={"A": [1, 50, 3]})
        first, second = standings(race)
        assert (first.name, second.name) == ("B", "A")
        assert (second.metric.mean, second.metric.count, second.seconds.mean) == (98.0, 2, 2.0)
        assert not second.complete
        # Best is marked among those that finished, and the cell says how many did.
        accuracy = columns(race, [first, second])[3]
        assert accuracy.cells[1] == "98.00 ± 1.41 (2/3)"

    @pytest.mark.parametrize("spoil", [{"diverged": True}, {"error": "RuntimeError: no"}, {"history": []}])
    def test_a_run_that_did_not_finish_is_lost_however_good_it_looked(self, spoil):
        race = short_race({"A": (True, [99.0, 50.0])})
        race["entrants"][0]["runs"][0].update(spoil)
        assert standings(race)[0].metric.mean == 50.0

    @pytest.mark.parametrize(("higher", "target", "expected"), [(True, 90.0, 3.0), (False, 70.0, 2.0)])
    def test_time_to_target_is_the_first_time(self, higher, target, expected):
        race = short_race({"A": (True, [50.0])}, higher=higher, target=target)
        run = race["entrants"][0]["runs"][0]
        path = [80.0, 70.0, 90.0, 60.0]
        run["history"] = [
            {**run["history"][0], "step": i, "seconds": float(i), "test_metric": m} for i, m in enumerate(path, 1)
        ]
        assert standings(race)[0].reached.mean == expected

    def test_seeds_that_missed_the_target_are_counted(self):
        race = short_race(
            {"A": (True, [97.0, 90.0]), "B": (False, [96.0, 97.0])}, target=96.0, times={"A": [1, 1], "B": [4, 6]}
        )
        ranked = standings(race)
        column = next(c for c in columns(race, ranked) if c.title == "to 96 %")
        assert dict(zip([s.name for s in ranked], column.cells, strict=True)) == {"B": "5", "A": "1 (1/2)"}
        assert [ranked[i].name for i in column.best] == []  # one of the two is no contest

    def test_step_cost_is_held_against_adamw(self):
        race = short_race({"MFAC": (True, [90.0]), "AdamW": (False, [80.0])})
        race["entrants"][0]["runs"][0]["step_ms"] = 3.0
        assert columns(race, standings(race))[-2].cells == ["1.50", "1.00"]

    def test_without_adamw_there_is_no_such_column(self):
        race = short_race({"MFAC": (True, [90.0]), "SGD": (False, [80.0])})
        assert not any("AdamW" in c.unit for c in columns(race, standings(race)))

    def test_best_of_each_column(self):
        race = short_race({"A": (True, [90.0, 90.0]), "B": (False, [80.0, 80.0])}, times={"A": [2, 2], "B": [1, 1]})
        by_title = {c.title: c for c in columns(race, standings(race))}
        assert by_title["accuracy"].best == {0}
        assert by_title["time"].best == {1}
        assert by_title["memory"].best == {0, 1}  # equal to the reader, equally good

    def test_one_outlier_does_not_cost_the_others_their_digits(self):
        race = short_race({"A": (True, [0.1234]), "B": (False, [0.2]), "C": (False, [12345.6])}, higher=False, unit="")
        assert columns(race, standings(race))[3].cells == ["0.1234", "0.2000", "12346"]

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0"), (0.619123, "0.619"), (98765.4, "98765"), (3e-7, "3e-07"), (-0.5, "-0.5"), (2.3456e12, "2.35e+12")],
    )
    def test_numbers_for_reading(self, value, text):
        assert number(value) == text


class TestVerdict:
    def test_a_clear_win(self):
        headline, text = said(short_race({"MFAC": (True, [98.0, 98.2]), "AdamW": (False, [97.0, 97.2])}))
        assert headline == "MFAC wins on digits"
        assert "98.10 ± 0.14 % accuracy, 1.00 points better than AdamW, the best rival" in text
        assert "more than the seeds’ spread (0.20)" in text

    def test_a_defeat_is_said_and_measured_against_our_best(self):
        race = {"SGD": (False, [99.0, 99.2]), "AdamW": (False, [98.0, 98.1]), "Ginger": (True, [97.0, 97.2])}
        headline, text = said(short_race(race))
        assert headline == "SGD wins on digits"
        assert "2.00 points better than Ginger, the best of quadric’s" in text

    def test_a_winner_level_with_its_own_side_does_not_take_all(self):
        race = {"SGD": (False, [99.0, 99.2]), "AdamW": (False, [98.9, 99.1]), "Muon": (False, [98.9, 99.2])}
        headline, text = said(short_race(race | {"Ginger": (True, [97.0, 97.2])}))
        assert headline == "SGD, Muon and AdamW lead on digits"
        assert "level with Muon and AdamW within the seeds’ spread, but 2.00 points better than Ginger" in text

    def test_a_difference_within_the_spread_is_a_tie(self):
        headline, text = said(short_race({"MFAC": (True, [97.0, 99.0]), "AdamW": (False, [96.9, 98.9])}))
        assert headline == "A tie on digits"
        assert "the 0.10 points between them lie within the seeds’ spread (2.00)" in text

    def test_one_seed_proves_nothing(self):
        headline, text = said(short_race({"MFAC": (True, [98.0]), "AdamW": (False, [90.0])}))
        assert headline == "MFAC ahead on digits"
        assert "a single seed cannot say" in text

    def test_a_better_mean_over_fewer_seeds_does_not_lose_silently(self):
        headline, text = said(short_race({"MFAC": (True, [90.0, 90.2]), "AdamW": (False, [99.0, None])}))
        assert headline == "No clear winner on digits"
        assert "which lost 1 of 2 seeds, ended at 99.00 %" in text

    def test_alone(self):
        headline, text = said(short_race({"MFAC": (True, [98.0, 98.0])}))
        assert headline == "MFAC ran alone on digits"
        assert text == "MFAC ran alone and ended at 98.00 ± 0.00 % accuracy."

    def test_only_one_finished(self):
        assert said(short_race({"MFAC": (True, [98.0]), "SGD": (False, [None])}))[0] == "MFAC alone finished on digits"

    def test_none_finished(self):
        race = short_race({"MFAC": (True, [None, None]), "SGD": (False, [None, None])})
        assert said(race) == ("No run finished on digits", "All 4 runs diverged or failed.")

    def test_a_tiny_difference_is_not_printed_as_zero(self):
        race = short_race({"A": (True, [90.001, 90.001]), "B": (False, [90.0, 90.0])})
        assert "0.001 points better" in said(race)[1]

    @pytest.mark.parametrize(
        ("times", "words"),
        [
            (
                {"A": [1, 1.1], "B": [5, 5.1]},
                "A was quickest to 96 % (1.05 s, against 5.05 s for B, the quickest rival)",
            ),
            (
                {"A": [5, 5.1], "B": [1, 1.1]},
                "B was quickest to 96 % (1.05 s, against 5.05 s for A, the quickest of quad",
            ),
            ({"A": [1, 3], "B": [1.1, 3.1]}, "A and B were equally quick to 96 % within the spread (2 and 2.1 s)"),
        ],
    )
    def test_pace(self, times, words):
        race = short_race({"A": (True, [97.0, 97.0]), "B": (False, [96.5, 96.5])}, target=96.0, times=times)
        assert words in said(race)[1]

    def test_pace_of_one_level_with_its_own_side(self):
        finals = {"A": (True, [97.0, 97.0]), "B": (False, [96.5, 96.5]), "C": (False, [96.4, 96.4])}
        race = short_race(finals, target=96.0, times={"A": [5, 6], "B": [1, 2], "C": [1.1, 2.1]})
        assert "B and C were quickest to 96 % (1.5 and 1.6 s, against 5.5 s for A, the quick" in said(race)[1]

    def test_pace_where_nobody_got_there(self):
        race = short_race({"A": (True, [90.0]), "B": (False, [91.0])}, target=96.0)
        assert said(race)[1].endswith("; none reached 96 %.")

    def test_pace_where_nobody_always_got_there(self):
        finals = {"A": (True, [97.0, 97.0, 90.0]), "B": (False, [90.0, 97.0, 90.0])}
        times = {"A": [2, 4, 1], "B": [1, 1, 1]}
        text = said(short_race(finals, target=96.0, times=times))[1]
        assert text.endswith("; A reached 96 % most often, in 2 of 3 seeds, in 3 s.")
        finals["B"] = (False, [90.0, 90.0, 90.0])
        text = said(short_race(finals, target=96.0, times=times))[1]
        assert text.endswith("; A alone reached 96 % in 3 s, though not in every seed (2 of 3).")

    def test_pace_of_one_that_missed_a_seed_does_not_count_against_one_that_never_did(self):
        finals = {"A": (True, [97.0, 90.0]), "B": (False, [97.0, 97.0])}
        race = short_race(finals, target=96.0, times={"A": [1, 1], "B": [5, 5]})
        assert said(race)[1].endswith("; B alone reached 96 % in every seed, in 5 s.")
        race = short_race(
            finals | {"C": (False, [97.0, 97.0])}, target=96.0, times={"A": [1, 1], "B": [5, 5], "C": [7, 7]}
        )
        assert "B was quickest to 96 % (5 s, against 7 s for C, the next), of those that got there" in said(race)[1]
