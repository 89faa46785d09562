"""The local journal: order, ownership, and its state after a kill and on a damaged disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from serving.tenancy.ledger import journal as journals
from serving.tenancy.ledger import journal_lines
from serving.tenancy.ledger.journal import Journal, abandoned, living, size_bytes
from serving.tenancy.ledger.journal_lines import JournalReader

if TYPE_CHECKING:
    from pathlib import Path


def _everything(reader: JournalReader) -> list[Any]:
    found = []
    while nbytes := (batch := reader.read())[1]:
        assert reader.read() == batch  # the same until `advance`
        assert nbytes > 0
        found += batch[0]
        reader.advance()
    return found


def test_entries_are_read_in_order_and_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are read in order over many segments; written ones leave the disk, in the end all of them."""
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(journal_lines, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(journal_lines, "_READ_BYTES", 400)
    journal = Journal(tmp_path, "one").open()
    read: list[Any] = []
    for number in range(200):
        journal.append({"number": number, "text": "x" * (number % 50)})
        if number % 7 == 0:
            entries, nbytes = journal.reader.read()
            read += entries
            journal.discard_written(len(entries), nbytes)
            journal.sync()
    assert journal.pending_bytes > 0
    while (batch := journal.reader.read())[1]:
        read += batch[0]
        journal.discard_written(len(batch[0]), batch[1])
    assert [entry["number"] for entry in read] == list(range(200))
    assert journal.pending_bytes == 0
    assert journal.appended == journal.written == 200
    assert len(list(tmp_path.rglob("*.log"))) == 1
    journal.close()
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_pending_journal_stays_and_is_found(tmp_path: Path) -> None:
    """A journal closed with pending entries can be replayed; one whose owner lives cannot."""
    left, living = Journal(tmp_path, "left").open(), Journal(tmp_path, "living").open()
    left.append([1])
    left.close()
    living.append([2])
    found = list(abandoned(tmp_path, excluding="mine"))
    assert [each.owner for each in found] == ["left"]
    with found[0] as dead:
        assert list(abandoned(tmp_path, excluding="mine")) == []  # locked by this process, for now
        assert _everything(dead.reader) == [[1]]
        assert size_bytes(tmp_path, excluding="living") > 0
        dead.remove()
    assert size_bytes(tmp_path, excluding="living") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["living"]
    living.close()


def test_sigkill_loses_nothing(tmp_path: Path) -> None:
    """Entries survive SIGKILL without a sync, and the lock is free."""
    program = (
        "import sys, pathlib, time\n"
        "from serving.tenancy.ledger.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), 'killed').open()\n"
        "for number in range(1000): journal.append({'number': number})\n"
        "print('appended', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"appended\n"
        assert list(abandoned(tmp_path, excluding="mine")) == []
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with next(abandoned(tmp_path, excluding="mine")) as dead:
        assert [entry["number"] for entry in _everything(dead.reader)] == list(range(1000))


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    """A torn or changed line is counted and skipped; the lines around it are read."""
    journal = Journal(tmp_path, "one").open()
    for number in range(5):
        journal.append({"number": number})
    segment = next(tmp_path.rglob("*.log"))
    lines = segment.read_bytes().rstrip(b"\0").splitlines(keepends=True)
    lines[1] = lines[1].replace(b"1", b"7", 1)
    lines[3] = lines[3][:9] + b"\n"
    segment.write_bytes(b"".join(lines) + b"0000")  # and an incomplete line
    assert [entry["number"] for entry in _everything(journal.reader)] == [0, 2, 4]
    assert journal.reader.damaged == 2
    journal.close()


def test_a_full_disk_leaves_no_torn_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that does not fit raises, and entries appended afterwards are complete."""
    journal = Journal(tmp_path, "one").open()
    journal.append({"number": 0})
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, line, offset: write(file, line[:5], offset))
    with pytest.raises(OSError, match="No space"):
        journal.append({"number": 1})
    monkeypatch.undo()
    journal.append({"number": 2})
    assert _everything(journal.reader) == [{"number": 0}, {"number": 2}]
    assert journal.reader.damaged == 0
    journal.close()


def test_a_segment_is_allocated_before_use_and_read_to_its_zeros(tmp_path: Path) -> None:
    """The file has its full size at once; the reader stops at the zeros, and only the content counts as pending."""
    journal = Journal(tmp_path, "one").open()
    journal.append([1])
    [segment] = tmp_path.rglob("*.log")
    assert segment.stat().st_size == 2**20
    assert segment.stat().st_blocks * 512 >= 2**20
    assert journal.reader.read() == ([[1]], 13)
    assert JournalReader(journal.directory).read() == ([[1]], 13)
    assert size_bytes(tmp_path, excluding="two") == 13
    assert living(tmp_path, excluding="two") == ["one"]
    assert living(tmp_path, excluding="one") == []
    journal.close()


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """The owner's reader stops where the last append ended, whatever the file already shows behind it."""
    journal = Journal(tmp_path, "one").open()
    journal.append([1])
    [segment] = tmp_path.rglob("*.log")
    with segment.open("r+b") as file:
        file.seek(13)
        file.write(b"0000\0\0\0\0 [2]\n")
    assert journal.reader.read() == ([[1]], 13)
    journal.close()


def test_a_journal_of_an_earlier_version_is_replayed(tmp_path: Path) -> None:
    """Segments without zeros, and larger than those of this version, are read to their end."""
    journal = Journal(tmp_path, "old").open()
    journal.append(["x" * 1000])
    [segment] = tmp_path.rglob("*.log")
    line = segment.read_bytes().rstrip(b"\0")
    journal.close()
    segment.write_bytes(line * 3000)
    found = 0
    with next(abandoned(tmp_path, excluding="mine")) as dead:
        while (batch := dead.reader.read())[1]:
            found += len(batch[0])
            dead.reader.advance()
    assert (found, dead.reader.damaged) == (3000, 0)
