"""Files that are written whole or not at all."""

import pytest

from fxzip.tracing.whole_files import written_whole


def test_what_was_there_stays_where_writing_fails(tmp_path):
    place = tmp_path / "a.txt"
    place.write_text("before")

    def fails():
        with written_whole(place) as part:
            part.write_text("half of")
            assert place.read_text() == "before"
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        fails()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


def test_two_that_write_at_once_leave_the_file_of_one(tmp_path):
    place = tmp_path / "a.txt"
    with written_whole(place) as first, written_whole(str(place)) as second:
        first.write_text("first")
        second.write_text("second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "first")]
