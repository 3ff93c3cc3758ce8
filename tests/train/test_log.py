"""The metrics file and its TensorBoard events, through kills and full disks."""

import json
import os
import struct
import subprocess
import sys
import textwrap

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from geomjax.train.log import FILE, TIMING, MetricsLog, read_rows, read_rows_from


def _write(log, first, last, *, updates=2):
    """Steps first to last, each with its updates; an evaluation on even ones."""
    for step in range(first, last + 1):
        for i in range(updates):
            update = (step - 1) * updates + i + 1
            log.write("train", step, {"update": update, "loss": 1.0 / (update + 2)})
        if step % 2 == 0:
            log.write("eval", step, {"accuracy": step / 10})


def _uninterrupted(directory, last):
    log = MetricsLog(directory, resume_step=None)
    log.write("eval", 0, {"accuracy": 0.1})
    _write(log, 1, last)
    log.close()
    return (directory / FILE).read_bytes()


def _events(directory):
    """All events of a folder, in TensorBoard's order; checks every record's CRC."""
    assert crc32c(b"123456789") == 0xE3069283
    events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            body = data[12 : 12 + size]
            (crc,) = struct.unpack("<I", data[12 + size : 16 + size])
            assert crc == masked_crc32c(body)
            events.append(Event.FromString(body))
            data = data[16 + size :]
    return events


def _shown(directory):
    """{tag: [(abscissa, value)]} as TensorBoard shows it, purging at session starts."""
    series = {}
    for event in _events(directory):
        if event.session_log.status == SessionLog.START:
            series = {
                tag: [point for point in points if point[0] < event.step]
                for tag, points in series.items()
            }
        for value in event.summary.value:
            points = series.setdefault(value.tag, [])
            points.append((event.step, value.simple_value))
    return series


def test_rows_are_json_lines_in_order(tmp_path):
    _uninterrupted(tmp_path, 2)
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert rows == read_rows(tmp_path)
    assert rows == [
        {"kind": "eval", "step": 0, "accuracy": 0.1},
        {"kind": "train", "step": 1, "update": 1, "loss": 1 / 3},
        {"kind": "train", "step": 1, "update": 2, "loss": 1 / 4},
        {"kind": "train", "step": 2, "update": 3, "loss": 1 / 5},
        {"kind": "train", "step": 2, "update": 4, "loss": 1 / 6},
        {"kind": "eval", "step": 2, "accuracy": 0.2},
    ]


def test_a_run_without_a_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path) == []


def test_the_same_values_make_the_same_bytes(tmp_path):
    assert _uninterrupted(tmp_path / "a", 6) == _uninterrupted(tmp_path / "b", 6)


def test_rows_after_the_step_resumed_from_are_dropped(tmp_path):
    whole = _uninterrupted(tmp_path / "whole", 6)
    directory = tmp_path / "resumed"
    _uninterrupted(directory, 5)
    log = MetricsLog(directory, resume_step=3)
    log.sync()
    assert {row["step"] for row in read_rows(directory)} == {0, 1, 2, 3}
    _write(log, 4, 6)
    log.close()
    assert (directory / FILE).read_bytes() == whole


def test_a_start_without_a_checkpoint_keeps_nothing(tmp_path):
    whole = _uninterrupted(tmp_path, 4)
    assert _uninterrupted(tmp_path, 4) == whole
    MetricsLog(tmp_path, resume_step=None).close()
    assert (tmp_path / FILE).read_bytes() == b""


def test_resuming_at_the_start_keeps_its_evaluation(tmp_path):
    _uninterrupted(tmp_path, 2)
    MetricsLog(tmp_path, resume_step=0).close()
    assert [row["step"] for row in read_rows(tmp_path)] == [0]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_cut_off_last_line_is_no_row(tmp_path, cut):
    whole = _uninterrupted(tmp_path / "whole", 6)
    directory = tmp_path / "killed"
    _uninterrupted(directory, 4)
    path = directory / FILE
    rows = read_rows(directory)
    path.write_bytes(path.read_bytes()[:-cut])
    kept = read_rows(directory)
    assert len(kept) < len(rows)
    assert kept == rows[: len(kept)]
    log = MetricsLog(directory, resume_step=2)
    _write(log, 3, 6)
    log.close()
    assert path.read_bytes() == whole


def test_a_temporary_file_of_a_killed_process_is_replaced(tmp_path):
    whole = _uninterrupted(tmp_path, 4)
    (tmp_path / f".{FILE}.tmp").write_text('{"kind": "tra')
    MetricsLog(tmp_path, resume_step=4).close()
    assert (tmp_path / FILE).read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == [FILE, "tensorboard", TIMING]


def test_a_row_is_visible_to_other_readers_once_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, resume_step=None)
    _write(log, 1, 1)
    assert len(read_rows(tmp_path)) == 2
    log.close()


def test_rows_are_read_on_from_where_they_ended(tmp_path):
    _uninterrupted(tmp_path, 3)
    rows, whole = read_rows(tmp_path), (tmp_path / FILE).read_bytes()
    assert read_rows_from(tmp_path, 0) == (rows, len(whole))
    assert read_rows_from(tmp_path, len(whole)) == ([], len(whole))
    first, offset = [], 0
    for end in range(0, len(whole) + 1, 13):  # As a file that grows.
        (tmp_path / FILE).write_bytes(whole[:end])
        more, offset = read_rows_from(tmp_path, offset)
        first += more
        assert whole[:offset].count(b"\n") == len(first)
    (tmp_path / FILE).write_bytes(whole)
    assert first + read_rows_from(tmp_path, offset)[0] == rows
    assert read_rows_from(tmp_path / "none", 5) == ([], 5)


def test_events_hold_every_scalar_by_update(tmp_path):
    _uninterrupted(tmp_path, 4)
    shown = _shown(tmp_path)
    assert sorted(shown) == ["eval/accuracy", "train/loss"]
    assert [x for x, _ in shown["train/loss"]] == list(range(1, 9))
    assert [y for _, y in shown["train/loss"]] == pytest.approx(
        [1 / (x + 2) for x in range(1, 9)]
    )
    # Two updates a step: an evaluation stands where its updates end.
    assert [x for x, _ in shown["eval/accuracy"]] == [0, 4, 8]


def test_tensorboard_shows_a_resumed_run_as_one_that_was_not(tmp_path):
    _uninterrupted(tmp_path / "whole", 9)
    directory = tmp_path / "resumed"
    _uninterrupted(directory, 6)
    for resume, last in ((4, 7), (4, 5), (5, 9)):
        log = MetricsLog(directory, resume_step=resume)
        _write(log, resume + 1, last)
        log.close()
    assert len(list((directory / "tensorboard").iterdir())) == 4
    assert _shown(directory) == _shown(tmp_path / "whole")


def test_tensorboard_forgets_a_run_that_begins_anew(tmp_path):
    _uninterrupted(tmp_path, 6)
    _uninterrupted(tmp_path, 2)
    assert [x for x, _ in _shown(tmp_path)["train/loss"]] == [1, 2, 3, 4]


FULL_DISK = textwrap.dedent(
    """
    import errno, resource, sys
    from pathlib import Path

    from geomjax.train.log import MetricsLog, read_rows

    log = MetricsLog(Path(sys.argv[1]), resume_step=None)
    log.write("eval", 0, {"accuracy": 0.5})
    log.sync()
    # As on a full disk, no file can be written beyond this size.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        try:
            for step in range(1, 10_000):
                log.write("train", step, {"update": step, "loss": 1.0})
                log.sync()
        finally:
            log.close()
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        raise SystemExit("no error")
    rows = read_rows(Path(sys.argv[1]))
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > 100
    print("done")
    """
)


def test_a_full_disk_is_an_error_and_not_a_wait(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
