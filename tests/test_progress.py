"""What a long job says on stderr: lines now and then in a pipe, a bar on a terminal."""

from __future__ import annotations

import threading

import pytest

from neuroweave import progress as room
from neuroweave.cli.console import progress as of_a_command
from neuroweave.progress import Lines, amount, follow, fraction, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set in place."""
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_one_every_30_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("measuring", total=123, unit="window") as lines:
        for _ in range(123):
            clock[0] += 1.0
            lines.update()
    assert capsys.readouterr() == (
        "",
        "measuring: 123 windows\n"
        "measuring: 30 of 123 windows, 30 s\n"
        "measuring: 60 of 123 windows, 60 s\n"
        "measuring: 90 of 123 windows, 90 s\n"
        "measuring: 120 of 123 windows, 120 s\n",
    )


def test_a_part_taken_up_again_and_one_of_unknown_length(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("measuring", total=7, unit="window", done=5) as lines:
        clock[0] += 40.4
        lines.update()
    with progress("weights of b", unit="tensor") as lines:
        clock[0] += 31
        lines.update()
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 7 windows, 5 of them done before",
        "measuring: 6 of 7 windows, 40 s",
        "weights of b",
        "weights of b: 1 tensor, 31 s",
    ]


def test_a_quick_command_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with of_a_command("fusing") as report:
        for done in range(0, 6_000_000_001, 1_000_000_000):
            report(done, 6_000_000_000)
            clock[0] += 4.9
    assert capsys.readouterr().err == ""
    with of_a_command("fusing") as report:
        for done in range(0, 6_000_000_001, 1_000_000_000):
            report(done, 6_000_000_000)
            clock[0] += 7
    assert capsys.readouterr().err == "fusing: 5.0 GB of 6.0 GB, 35 s\n"


def test_several_threads_share_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("reading", total=8, unit="file", quiet=True)
    later = room.time.monotonic() + 30.4

    def slow() -> float:
        threading.Event().wait(0.01)  # another thread runs meanwhile
        return later

    monkeypatch.setattr(room.time, "monotonic", slow)
    workers = [threading.Thread(target=lines.update) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert lines.n == 8
    assert capsys.readouterr().err == "reading: 1 of 8 files, 30 s\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(room.sys.stderr, "isatty", lambda: True)
    with progress("measuring", total=4, unit="window", done=1) as bar:
        follow(bar)(3, 4)
        assert (bar.n, bar.total) == (3, 4)
    assert "measuring:  75%" in capsys.readouterr().err


def test_words() -> None:
    assert [amount(count, "text") for count in (0, 1, 7)] == ["0 texts", "1 text", "7 texts"]
    assert [amount(count, "B") for count in (0, 999, 1000, 1_500_000, 7_250_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.5 MB",
        "7.2 GB",
    ]
    assert fraction(1, 1, "text") == "1 of 1 text"
