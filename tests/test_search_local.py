"""The local index: found whatever is asked, always up to date, whole after a kill, and open to several at once."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_search_documents import pdf

from neuroweave.chat.search import LocalFolder, SearchError, index_file, provider_of
from neuroweave.chat.search.documents import read_document
from neuroweave.chat.search.index_file import NAME, Entry, IndexFile, State, discard, index_place
from neuroweave.chat.search.passages import Passage
from neuroweave.chat.search.queries import match_expression, query_words
from neuroweave.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    (docs / "staff").mkdir(parents=True)
    (docs / "staff" / "leave.md").write_text(
        "# Leave\n\nStaff get 31 days.\n\n## Carrying over\n\nFive days, until March.\n"
    )
    (docs / "tea_times.txt").write_text("Tea is served at four in the kitchen.\n")
    (docs / "page.html").write_text("<title>Cake</title><main><h1>Cake</h1><p>Cakes are baked on Friday.</p></main>")
    (docs / "paper.pdf").write_bytes(pdf("The kettle boils water"))
    return docs


def titles(folder: Path, query: str) -> list[str]:
    return [source.title for source in LocalFolder(folder).search(query, count=5)]


def sound(folder: Path) -> int:
    """The number of documents in an index that holds what it says and nothing else."""
    with sqlite3.connect(index_place(folder)) as database:
        for table in ("passages", "pages"):
            database.execute(f"INSERT INTO {table}({table}) VALUES ('integrity-check')")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        documents = database.execute("SELECT id, first, passages FROM documents WHERE passages > 0").fetchall()
        expected = {(row, number) for number, first, count in documents for row in range(first, first + count)}
        assert set(database.execute("SELECT rowid, document FROM passages")) == expected
        assert {row for (row,) in database.execute("SELECT rowid FROM pages")} == {number for number, _, _ in documents}
    database.close()
    return len(documents)


def older(file: Path) -> None:
    """As if the file had been written a minute ago: not so young that it is looked at again anyway."""
    at = time.time() - 60
    os.utime(file, (at, at))


# --- finding ---


def test_every_kind_of_document_is_found(folder: Path) -> None:
    found = LocalFolder(folder).search("When do the staff bake cakes?", count=5)
    assert (found[0].title, found[0].address) == ("Cake", "page.html")
    assert titles(folder, "how many days of leave do I get") == ["Leave"]
    assert titles(folder, "kettles") == ["paper"]
    assert titles(folder, "TEA TIMES") == ["tea times"]
    assert titles(folder, "what about elephants") == []
    source = LocalFolder(folder).search("carry over until which month?", count=1)[0]
    assert source.address == "staff/leave.md"
    assert source.text == "Leave\n\nStaff get 31 days.\n\nCarrying over\n\nFive days, until March."
    assert source.score > 0


def test_no_query_can_break_it(folder: Path) -> None:
    search = LocalFolder(folder)
    odd = [
        '"', '""', "'", "tea AND", "NOT tea", "tea OR", "(tea", "tea)", "NEAR(tea, 2)", "tea*", "^tea", "title:tea",
        "-tea", "{title}: tea", "tea + four", "tea\x00four", "a:b:c", "\ud800tea", "tea;DROP TABLE passages", "%",
        "\\", "tea\u200bfour", "\u2603", "\U0001f600 tea", "x" * 5000 + " tea",
    ]  # fmt: skip
    for query in odd:
        found = search.search(query, count=3)
        assert [source.title for source in found] == (["tea times"] if "tea" in query.casefold() else []), query
    for nothing in ("", "   ", "?!", "\n\t"):
        assert search.search(nothing, count=3) == []
    assert search.search("tea", count=0) == []
    assert search.search("tea " * 3000, count=3)[0].title == "tea times"


def test_stop_words_count_only_when_there_is_nothing_else(folder: Path) -> None:
    (folder / "hamlet.txt").write_text("To be, or not to be, that is the question.")
    assert query_words("How do I get to the tea?") == ["tea"]
    assert query_words("To be or not to be") == ["to", "be", "or", "not"]
    assert titles(folder, "to be or not to be")[0] == "hamlet"


def test_words_that_are_more_than_one() -> None:
    assert match_expression("os.path.join") == '"os path join" OR "os" OR "path" OR "join"'
    assert match_expression("What is C++?") == '"c"'
    assert match_expression('say "hello"') == '"say" OR "hello"'
    assert match_expression("don't") == '"don" OR "t"'


def test_other_scripts(folder: Path) -> None:
    texts = {
        "chinese": "\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002",
        "japanese": "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
        "russian": "\u041c\u043e\u0441\u043a\u0432\u0430 \u2014 \u0441\u0442\u043e\u043b\u0438\u0446\u0430.",
        "accents": "Le caf\u00e9 est ferm\u00e9.",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    assert titles(folder, "\u4e2d\u56fd\u9996\u90fd")[0] == "chinese"
    assert titles(folder, "\u65e5\u672c")[0] == "japanese"
    assert titles(folder, "\u041c\u041e\u0421\u041a\u0412\u0410") == ["russian"]
    assert titles(folder, "cafe ferme") == ["accents"]
    found = LocalFolder(folder).search("\u5317\u4eac", count=1)[0]
    assert found.text == texts["chinese"]


def test_documents_that_say_the_same_are_given_once(folder: Path) -> None:
    text = " ".join(f"elephant{number}" for number in range(50))
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"{text} elephant")
    (folder / "other.txt").write_text("An elephant of another kind.")
    assert sorted(titles(folder, "elephant")) in (["a", "other"], ["b", "other"], ["c", "other"])


def test_what_a_title_says_counts_for_more(folder: Path) -> None:
    (folder / "one.md").write_text("# Giraffes\n\nThey are tall animals.\n")
    (folder / "two.md").write_text("# Animals\n\nThere are lions, zebras, giraffes and others.\n")
    assert titles(folder, "giraffe") == ["Giraffes", "Animals"]


# --- following the folder ---


def test_only_what_changed_is_read(folder: Path) -> None:
    search = LocalFolder(folder)
    first = search.refresh()
    assert (first.added, first.changed, first.removed, first.documents, first.problems) == (4, 0, 0, 4, ())
    assert first.index == folder / NAME
    again = search.refresh()
    assert (again.added, again.changed, again.removed) == (0, 0, 0)
    (folder / "tea_times.txt").write_text("Coffee is served at noon.\n")
    (folder / "new.txt").write_text("Biscuits are in the tin.\n")
    (folder / "page.html").unlink()
    (folder / "staff").rename(folder / "people")
    done = search.refresh()
    assert (done.added, done.changed, done.removed, done.documents) == (2, 1, 2, 4)
    assert sound(folder) == 4
    assert titles(folder, "tea") == ["tea times"]  # its name
    assert titles(folder, "served at four") == ["tea times"]
    assert [titles(folder, query) for query in ("coffee", "biscuit", "cake")] == [["tea times"], ["new"], []]
    assert LocalFolder(folder).search("leave", count=1)[0].address == "people/leave.md"


def test_a_search_sees_changes_by_itself_after_a_rest(folder: Path) -> None:
    now = [100.0]
    search = LocalFolder(folder, clock=lambda: now[0])
    assert search.search("walrus", count=1) == []
    (folder / "walrus.txt").write_text("A walrus.")
    assert search.search("walrus", count=1) == []
    now[0] += 2.5
    assert [source.title for source in search.search("walrus", count=1)] == ["walrus"]
    (folder / "walrus.txt").unlink()
    now[0] += 2.5
    assert search.search("walrus", count=1) == []


def test_a_change_that_keeps_size_and_time_is_seen_while_the_file_is_young(folder: Path) -> None:
    file = folder / "tea_times.txt"
    LocalFolder(folder).refresh()
    state = file.stat()
    file.write_text("Tea is served at nine in the kitchen.\n")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert LocalFolder(folder).refresh().changed == 1
    assert "nine" in LocalFolder(folder).search("tea", count=1)[0].text


def test_touched_files_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LocalFolder(folder).refresh()
    for file in folder.rglob("*.*"):
        older(file)
    read: list[str] = []
    from neuroweave.chat.search import refreshing

    monkeypatch.setattr(refreshing, "passages", lambda document: read.append(document.title))
    done = LocalFolder(folder).refresh()
    assert (done.changed, done.documents, read) == (0, 4, [])
    opened: list[object] = []
    monkeypatch.setattr(refreshing, "file_content", opened.append)
    LocalFolder(folder).refresh()  # now the times are known, and old enough
    assert opened == []


def test_links_hidden_files_and_binaries_are_left_out(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("secret walrus")
    (folder / "link.txt").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent, target_is_directory=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.txt").write_text("hidden walrus")
    (folder / ".dot.txt").write_text("dotted walrus")
    (folder / "_sources").mkdir()
    (folder / "_sources" / "a.rst").write_text("source walrus")
    (folder / "picture.png").write_bytes(b"walrus")
    (folder / "binary.txt").write_bytes(b"walrus\0\1\2")
    os.mkfifo(folder / "pipe.txt")
    done = LocalFolder(folder).refresh()
    assert done.documents == 4
    assert [(problem.path, problem.read) for problem in done.problems] == [("binary.txt", False)]
    assert titles(folder, "walrus") == []


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(folder: Path) -> None:
    (folder / "locked.pdf").write_bytes(
        pdf("x", edit=lambda writer: writer.encrypt("open sesame", algorithm="RC4-128"))
    )
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (folder / "empty.md").write_text("")
    (folder / "slip.txt").write_bytes("schöne Grüße".encode() + b" \xff walrus")
    (folder / os.fsdecode(b"n\xe4me.txt")).write_text("a name in latin-1")
    done = LocalFolder(folder).refresh()
    problems = {problem.path: (problem.reason, problem.read) for problem in done.problems}
    assert problems["locked.pdf"] == ("encrypted; save it without a password", False)
    assert problems["broken.pdf"][0].startswith("a broken PDF")
    assert problems["empty.md"] == ("no text in it", False)
    assert problems["slip.txt"] == ("1 of its characters were broken and are replaced", True)
    assert done.documents == 6
    assert titles(folder, "walrus") == ["slip"]
    assert LocalFolder(folder).search("latin", count=1)[0].address == "n\\xe4me.txt"
    assert {problem.path for problem in LocalFolder(folder).refresh().problems} == set(problems)  # kept, not read again
    (folder / "locked.pdf").write_bytes(pdf("The walrus was locked in"))
    assert "locked.pdf" not in {problem.path for problem in LocalFolder(folder).refresh().problems}
    assert set(titles(folder, "walrus")) == {"slip", "locked"}


def test_a_document_that_breaks_its_reader_costs_the_others_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(content: bytes, *, kind: str, name: str) -> Any:
        if name == "tea times":
            raise OverflowError
        return read_document(content, kind=kind, name=name)

    monkeypatch.setattr("neuroweave.chat.search.refreshing.read_document", broken)
    done = LocalFolder(folder).refresh()
    assert done.documents == 3
    assert [(each.path, each.reason) for each in done.problems] == [("tea_times.txt", "cannot be read (OverflowError)")]


def test_a_file_that_is_closed_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be opened does not show in a file's times."""
    from neuroweave.chat.search import refreshing

    read = refreshing.file_content

    def closed(file: refreshing.File) -> bytes:
        if file.place.endswith("tea_times.txt"):
            raise ValueError("cannot be read (Permission denied)")
        return read(file)

    older(folder / "tea_times.txt")
    monkeypatch.setattr(refreshing, "file_content", closed)
    done = LocalFolder(folder).refresh()
    assert [problem.reason for problem in done.problems] == ["cannot be read (Permission denied)"]
    assert LocalFolder(folder).refresh().changed == 0
    monkeypatch.setattr(refreshing, "file_content", read)
    done = LocalFolder(folder).refresh()
    assert (done.changed, done.problems) == (1, ())
    assert titles(folder, "tea") == ["tea times"]


def test_folders_without_documents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match="nothing to search; put"):
        LocalFolder(tmp_path / "empty").refresh()
    with pytest.raises(SearchError, match="nothing to search"):
        LocalFolder(tmp_path / "empty").search("tea", count=1)
    with pytest.raises(ValueError, match="no such folder; give a folder of"):
        provider_of(f"local:{tmp_path / 'nowhere'}")
    gone = LocalFolder(tmp_path / "empty")
    (tmp_path / "empty" / NAME).unlink()
    (tmp_path / "empty").rmdir()
    with pytest.raises(SearchError):
        gone.search("tea", count=1)


# --- the index file ---


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in (str(folder), str(folder / NAME)))
    done = LocalFolder(folder).refresh()
    assert done.index.parent == tmp_path / "cache" / "indexes"
    assert not (folder / NAME).exists()
    assert titles(folder, "tea") == ["tea times"]


@pytest.mark.parametrize(
    "content", [b"this is no database, but a text that stands here", b"SQLite format 3\0" + b"\7" * 4096]
)
def test_a_broken_index_is_built_anew(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    assert titles(folder, "tea") == ["tea times"]
    assert sound(folder) == 4


def test_an_index_damaged_inside_is_built_anew(folder: Path) -> None:
    search = LocalFolder(folder)
    search.refresh()
    data = bytearray((folder / NAME).read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    (folder / NAME).write_bytes(bytes(data))
    assert [source.title for source in search.search("tea", count=5)] == ["tea times"]
    assert sound(folder) == 4


def test_an_index_with_other_tables_is_built_anew(folder: Path) -> None:
    search = LocalFolder(folder)
    for change in ("DROP TABLE pages", "ALTER TABLE documents DROP COLUMN warning"):
        search.refresh()
        with sqlite3.connect(folder / NAME) as database:
            database.execute(change)
        database.close()
        assert [source.title for source in search.search("tea", count=5)] == ["tea times"]
        assert sound(folder) == 4


def test_an_index_or_a_folder_that_goes_during_a_chat(folder: Path) -> None:
    search = LocalFolder(folder)
    search.refresh()
    discard(folder / NAME)
    assert [source.title for source in search.search("tea", count=5)] == ["tea times"]
    shutil.rmtree(folder)
    with pytest.raises(SearchError, match="the folder has gone"):
        search.search("tea", count=5)
    folder.write_text("a file now")
    with pytest.raises(SearchError, match="the folder has gone"):
        search.search("tea", count=5)


def test_nobody_else_can_read_documents_in_the_index(folder: Path) -> None:
    LocalFolder(folder).refresh()
    for file in folder.glob(f"{NAME}*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_full_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = IndexFile._opened

    def small(self: IndexFile) -> sqlite3.Connection:
        database = opened(self)
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages + 2}")
        return database

    monkeypatch.setattr(IndexFile, "_opened", small)
    (folder / "long.txt").write_text("\n\n".join(f"word{at} " * 100 for at in range(200)))
    with pytest.raises(SearchError, match=r"the index cannot be written.*full"):
        LocalFolder(folder).refresh()


def test_a_cache_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROWEAVE_CACHE", "/dev/null")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SearchError, match=r"/dev/null/indexes/.*: the index cannot be written"):
        LocalFolder(folder).refresh()


def test_an_index_of_another_version_is_built_anew(folder: Path) -> None:
    LocalFolder(folder).refresh()
    with sqlite3.connect(folder / NAME) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert LocalFolder(folder).refresh().added == 4
    assert sound(folder) == 4


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.md").write_text(f"# Number {number}\n\n" + f"walrus{number} and others. " * 80)
    return folder


CHILD = """
import os, signal, sys
from neuroweave.chat.search import LocalFolder, index_file, refreshing
refreshing.BATCH = 5
folder, place, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if place == "between":
    LocalFolder(folder).refresh(progress=lambda done, total: done == count and die())
elif place == "inside":
    insert, calls = index_file.IndexFile._insert, []
    def counted(self, entry, passages):
        insert(self, entry, passages)
        calls.append(entry)
        if len(calls) == count:
            die()
    index_file.IndexFile._insert = counted
    LocalFolder(folder).refresh()
else:
    print(LocalFolder(folder).refresh().documents)
"""


def child(folder: Path, place: str, count: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), place, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("place", "count", "kept"), [("between", 17, 15), ("inside", 13, 10), ("inside", 3, 0)])
def test_a_kill_leaves_a_valid_index_with_what_was_read(tmp_path: Path, place: str, count: int, kept: int) -> None:
    docs = many(tmp_path / "docs", 30)
    with child(docs, place, count) as process:
        assert process.wait() == -9
    assert sound(docs) == kept
    done = LocalFolder(docs).refresh()
    assert (done.added, done.documents) == (30 - kept, 30)
    assert sound(docs) == 30
    assert titles(docs, "walrus29") == ["Number 29"]


def test_ctrl_c_keeps_what_was_read(tmp_path: Path) -> None:
    docs = many(tmp_path / "docs", 30)

    def stop(done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalFolder(docs).refresh(progress=stop)
    assert sound(docs) == 17
    assert LocalFolder(docs).refresh().added == 13


def test_two_processes_at_once(tmp_path: Path) -> None:
    docs = many(tmp_path / "docs", 60)
    with child(docs, "") as first, child(docs, "") as second:
        assert [process.communicate()[0].strip() for process in (first, second)] == ["60", "60"]
    assert sound(docs) == 60


def test_what_another_process_has_stored_is_not_stored_again(folder: Path) -> None:
    LocalFolder(folder).refresh()
    entry = Entry("new.txt", State(1, 2, 3, b"digest"), "New", None, [Passage("", "", "walrus")])
    with IndexFile(index_place(folder)) as first, IndexFile(index_place(folder)) as second:
        first.store([entry, replace(entry, path="later.txt")])
        before = first.database.execute("SELECT id, first FROM documents WHERE path = 'new.txt'").fetchall()
        second.store([entry])
        assert first.database.execute("SELECT id, first FROM documents WHERE path = 'new.txt'").fetchall() == before
    assert sound(folder) == 6


def test_searches_go_on_while_another_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in folder.rglob("*.*"):
        os.utime(file, (10**9, 10**9))
    search = LocalFolder(folder)
    search.refresh()
    with IndexFile(index_place(folder)) as index:
        index.database.execute("BEGIN EXCLUSIVE")
        index._delete("tea_times.txt")
        assert [source.title for source in search.search("tea", count=1)] == ["tea times"]
        monkeypatch.setattr(index_file, "BUSY", 0.1)
        assert LocalFolder(folder).refresh().documents == 4  # nothing has changed, so nothing is written
        index.database.execute("ROLLBACK")
    assert sound(folder) == 4


# --- the command ---


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked.pdf").write_bytes(
        pdf("x", edit=lambda writer: writer.encrypt("open sesame", algorithm="RC4-128"))
    )
    run(["index", str(folder)], 0)
    out, err = capsys.readouterr()
    assert out.startswith("4 documents, 5 passages (5 new files) in ")
    assert out.strip().endswith(f"index {folder / NAME}")
    assert err == "not read: locked.pdf: encrypted; save it without a password\n"
    run(["index", str(folder), "--json"], 0)
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["added"], told["index"]) == (4, 0, str(folder / NAME))
    assert told["problems"] == [
        {"path": "locked.pdf", "reason": "encrypted; save it without a password", "read": False}
    ]
    for name, reason in (("nowhere", "no such folder"), ("tea_times.txt", "a file; give a folder")):
        run(["index", str(folder / name)], 2)
        assert reason in capsys.readouterr().err
    run(["index", ""], 2)
    assert "give a folder" in capsys.readouterr().err


def test_names_of_files_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a\x1b]0;x\x07\nnot read\u202e.pdf").write_bytes(b"%PDF-1.7 nothing")
    run(["index", str(tmp_path)], 1)
    assert capsys.readouterr().err.startswith("not read: a]0;x not read.pdf: ")


def test_the_command_says_no_when_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7 nothing")
    run(["index", str(tmp_path)], 1)
    assert "not read: a.pdf" in capsys.readouterr().err


def run(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
