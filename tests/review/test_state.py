import json
import multiprocessing
import os
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from seats import REGIONS, SHAPE, automatic, flagged

from cardiac_qc_plugin.review.journal import Journal
from cardiac_qc_plugin.review.state import Refused, ReviewState, find_regions
from cardiac_qc_plugin.workflows.files import OutputError

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Player:
    """Plays events into a state, so many seconds apart."""

    def __init__(self):
        labels, numbers = automatic(), flagged()
        probability = np.zeros(SHAPE, np.float32)
        for number, (*_, value) in REGIONS.items():
            probability[numbers == number] = value
        self.state = ReviewState(labels, numbers, find_regions(numbers, probability))
        self.time = START
        self.do("open", reviewer="Dr A")

    def do(self, action, after=1.0, **event):
        self.time += timedelta(seconds=after)
        event = {"time": self.time.isoformat(), "action": action, **event}
        if action not in ("open", "close"):
            self.state.check(event)
        self.state.apply(event)


def stroke(voxels, label=2, z=1):
    return {"shape": list(SHAPE), "slice": z, "label": label, "voxels": voxels}


@pytest.fixture
def player():
    return Player()


def test_regions_are_found_with_their_boxes(player):
    for number, (z, row, col, probability) in REGIONS.items():
        region = player.state.regions[number]
        assert (region.slice, region.row0, region.row1, region.col0, region.col1) == (z, row, row + 8, col, col + 8)
        assert region.probability == pytest.approx(probability)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"voxels": [[16, 16], [0, 0], [15, 16]]},
            r"Voxels outside the flagged regions: \(0, 0, 1\), \(15, 16, 1\)",
        ),
        ({"slice": 2}, "outside the flagged regions"),
        ({"voxels": [[-48, 16]]}, "beyond the slice"),
        ({"voxels": [[16, 48]]}, "beyond the slice"),
        ({"voxels": [[16, 16, 1]]}, "list of"),
        ({"voxels": [[16], [16, 17]]}, "list of"),
        ({"voxels": [[16.5, 17]]}, "list of"),
        ({"voxels": [[True, True]]}, "list of"),
        ({"voxels": []}, "list of"),
        ({"voxels": None}, "list of"),
        ({"voxels": {"a": 1}}, "list of"),
        ({"voxels": [[10**30, 1]]}, "list of"),
        ({"slice": 4}, "no slice 4"),
        ({"slice": -1}, "no slice -1"),
        ({"slice": "1"}, "no slice"),
        ({"label": 4}, "Unknown label 4"),
        ({"label": -1}, "Unknown label"),
        ({"label": True}, "Unknown label"),
        ({"label": 1.0}, "Unknown label"),
        ({"label": [1]}, "Unknown label"),
        ({"shape": [64, 48, 5]}, r"shape \[64, 48, 5\], this case has \[64, 48, 4\]"),
        ({"shape": [48, 64, 4]}, "shape"),
        ({"shape": None}, "shape"),
    ],
)
def test_strokes_that_break_a_rule_change_nothing(player, change, message):
    with pytest.raises(Refused, match=message):
        player.do("paint", **{**stroke([[16, 16]]), **change})
    np.testing.assert_array_equal(player.state.labels, automatic())
    assert not player.state.done


@pytest.mark.parametrize(
    "event", [{"action": "format"}, {"action": None}, {"action": ["paint"]}, {"action": "undo"}, {"action": "redo"}]
)
def test_actions_that_cannot_be(player, event):
    with pytest.raises(Refused):
        player.state.check(event)


@pytest.mark.parametrize("regions", [[], [4], ["1"], [[1]], None, 1, [True]])
def test_decisions_on_unknown_regions(player, regions):
    with pytest.raises(Refused, match="no flagged regions"):
        player.do("decide", regions=regions, decision="accepted")


def test_the_trail_tells_of_which_regions_an_action_was_taken_back(player):
    player.do("paint", **stroke([[16, 16]]))
    player.do("decide", regions=[2, 3], decision="accepted")
    for action in ("undo", "undo", "redo", "redo"):
        player.do(action)
    painted, decided = (1, "1"), (player.state.regions[2].slice, "2 3")
    told = [(row["action"], (row["slice"], row["regions"])) for row in player.state.trail[1:]]
    assert told == [
        ("paint", painted),
        ("decide", decided),
        ("undo", decided),
        ("undo", painted),
        ("redo", painted),
        ("redo", decided),
    ]


def test_undo_and_redo_against_snapshots(player):
    """A random walk over strokes, decisions, undo and redo; the oracle keeps whole copies."""
    rng = np.random.default_rng(0)
    state, inside = player.state, {z: np.argwhere(flagged()[..., z]) for z in (1, 3)}

    def snapshot():
        return state.labels.copy(), dict(state.decisions), state.position

    past, future = [snapshot()], []
    for _ in range(300):
        kind = rng.choice(["paint", "decide", "undo", "redo"], p=[0.3, 0.2, 0.3, 0.2])
        if kind == "undo" and len(past) > 1:
            player.do("undo")
            future.append(past.pop())
        elif kind == "redo" and future:
            player.do("redo")
            past.append(future.pop())
        elif kind in ("paint", "decide"):
            z = int(rng.choice([1, 3]))
            voxels = rng.choice(inside[z], size=5).tolist()
            number = int(rng.integers(1, 4))
            if kind == "paint":
                player.do("paint", **stroke(voxels, label=int(rng.integers(4)), z=z))
            else:
                player.do("decide", regions=[number], decision="corrected" if number in state.changed else "accepted")
            past.append(snapshot())
            future.clear()
        labels, decisions, position = past[-1]
        np.testing.assert_array_equal(state.labels, labels)
        assert (dict(state.decisions), state.position) == (decisions, position)
    changed = state.labels != automatic()
    assert changed.any() and not (changed & (flagged() == 0)).any()


def test_decisions_have_to_be_true(player):
    with pytest.raises(Refused, match="accept them as correct"):
        player.do("decide", regions=[1], decision="corrected")
    player.do("decide", regions=[1], decision="accepted")
    assert player.state.decisions == {1: "accepted"} and player.state.position == 2
    outside_heart = [[16, 16]]
    player.do("paint", **stroke(outside_heart, label=3))
    assert player.state.decisions == {}  # painted in after it was accepted
    with pytest.raises(Refused, match="were edited"):
        player.do("decide", regions=[1, 2], decision="accepted")
    player.do("decide", regions=[1], decision="corrected")
    player.do("undo")
    player.do("undo")
    assert player.state.decisions == {1: "accepted"}


def test_finishing_needs_decisions_and_closes_the_case(player):
    with pytest.raises(Refused, match="Regions that are not decided yet: 1, 2, 3"):
        player.do("finish")
    player.do("decide", regions=[1, 2, 3], decision="accepted")
    player.do("finish")
    with pytest.raises(Refused, match="finished"):
        player.do("paint", **stroke([[16, 16]]))
    player.do("reopen")
    player.do("paint", **stroke([[16, 16]]))


def test_time_leaves_pauses_out(player):
    player.do("visit", region=2, after=10)
    player.do("active", after=59.5)
    player.do("active", after=61)  # a pause
    player.do("close", after=20)
    player.do("open", after=30, reviewer="Dr B")  # closed in between
    player.do("visit", region=1, after=5)
    assert player.state.seconds == pytest.approx(10 + 59.5 + 20 + 5)
    assert player.state.region_seconds == pytest.approx({1: 10, 2: 59.5 + 20 + 5})


def test_time_stops_when_the_case_is_finished(player):
    player.do("finish", after=10, incomplete=True)
    player.do("visit", region=2, after=20)
    player.do("reopen", after=20)
    player.do("visit", region=1, after=5)
    assert player.state.seconds == pytest.approx(10 + 5)


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "case" / "review.jsonl"
    journal = Journal(path)
    journal.append({"n": 0})
    journal.append({"n": 1})
    whole = path.read_bytes()
    for torn in range(len(whole) + 1):
        path.write_bytes(whole[:torn])
        kept = Journal(path)
        assert kept.events == [{"n": n} for n in range(whole[:torn].count(b"\n"))]
        kept.append({"n": "next"})
        assert Journal(path).events == [*kept.events]
    path.write_bytes(b'{"n": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="review.jsonl: a line is damaged"):
        Journal(path)


def test_what_cannot_be_saved_does_not_count(tmp_path):
    (tmp_path / "case").write_text("a file where the folder should be")
    journal = Journal(tmp_path / "case" / "review.jsonl")
    with pytest.raises(OutputError, match="cannot write"):
        journal.append({"n": 0})
    assert journal.events == []


def test_a_journal_that_was_moved_or_changed_is_not_continued(tmp_path):
    path = tmp_path / "review.jsonl"
    journal = Journal(path)
    journal.append({"n": 0})
    journal.append({"n": 1})
    for content in (None, b"", path.read_bytes()[:-9], b"\0" * journal.size):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(OutputError, match="removed or changed under the server: open the case again"):
            journal.append({"n": 2})
        assert path.is_file() == (content is not None) and (content is None or path.read_bytes() == content)
    assert [event["n"] for event in journal.events] == [0, 1]
    late = Journal(tmp_path / "late.jsonl")
    late.path.write_bytes(b'{"n": 0}\n')  # put back before the first event
    with pytest.raises(OutputError, match="changed under the server"):
        late.append({"n": 0})


def write_events(path, output):
    journal, pipe = Journal(path), open(output, "w", buffering=1)
    for n in range(len(journal.events), len(journal.events) + 100000):
        journal.append({"n": n, "padding": "x" * 5000})
        print(n, file=pipe)


def test_kill_9_while_the_journal_is_written(tmp_path):
    """Whatever was reported as saved is there after each kill, in order, and the next process goes on from it."""
    path, saved = tmp_path / "review.jsonl", -1
    for round in range(4):
        read, write = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=write_events, args=(path, write))
        process.start()
        os.close(write)
        with open(read) as reports:
            for _ in range(20 + 7 * round):
                saved = int(reports.readline())
            process.kill()
            process.join()
            reported = [int(line) for line in reports]
        saved = max([saved, *reported])
        numbers = [json.loads(json.dumps(event))["n"] for event in Journal(path).events]
        assert numbers == list(range(len(numbers))) and len(numbers) in (saved + 1, saved + 2)
        saved = len(numbers) - 1
