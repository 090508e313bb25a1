"""Passing of blocks to workers through shared memory."""

from __future__ import annotations

import multiprocessing

import pyarrow as pa
import pytest

from data_tools.preprocess.encoding import shared_slots
from data_tools.preprocess.encoding.shared_slots import SharedSlots
from data_tools.preprocess.input.blocks import FileRange, TableRows
from data_tools.preprocess.input.text_column import TextColumn, column_values

TEXTS = ["日本語", "", "text\n", "𠮷野家"]


def test_column_values():
    array = pa.array(["cut off", *TEXTS, "cut off"])[1:-1]  # a slice shares its array's buffers
    column = column_values(array)
    assert isinstance(column, TextColumn)
    assert list(column) == TEXTS and column[-1] == TEXTS[-1] and len(column) == 4
    with pytest.raises(IndexError):
        column[4]
    assert list(column_values(array[:0])) == []
    assert column_values(pa.array(["a", None])) == ["a", None]
    assert column_values(pa.array([{"a": 1}])) == [{"a": 1}]
    assert column_values(pa.array(TEXTS, pa.large_string())) == TEXTS
    wrong = pa.array([b"right", b"\xff", b"right"]).view(pa.string())
    assert list(column_values(wrong)) == ["right", b"\xff", "right"]


def read_all(slots, requests, answers):
    answers.send([slots.get(shared) for shared in requests.recv()])


@pytest.mark.parametrize("size", [64, 16])
def test_another_process_reads_what_was_put(size, monkeypatch):
    monkeypatch.setattr(shared_slots, "SLOT_BYTES", size)
    slots = SharedSlots(4)
    rows = TableRows({"text": column_values(pa.array(TEXTS)), "id": [1, 2, None, 4]}, 4)
    payloads = [b"line\n", FileRange("a.jsonl", 1, 2), b"a longer line\n" * 2, rows]
    context = multiprocessing.get_context("fork")
    (requests, request), (answer, answers) = context.Pipe(False), context.Pipe(False)
    worker = context.Process(target=read_all, args=(slots, requests, answers))
    worker.start()
    shared = [slots.put(number, payload) for number, payload in enumerate(payloads)]
    fits = size == 64  # else the last two payloads are sent as a whole
    assert [bool(one.ranges) for one in shared] == [True, False, fits, fits]
    request.send(shared)
    assert answer.poll(60) and answer.recv() == payloads
    worker.join()
