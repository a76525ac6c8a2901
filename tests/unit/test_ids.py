from __future__ import annotations

import os
import threading

from ray_guard import ids


def test_ids_are_lower_case_hex_and_differ_between_threads() -> None:
    found: list[str] = []

    def take() -> None:
        found.extend(ids.new_span_id() for _ in range(2000))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(found)) == 8000
    assert all(len(span) == 16 and int(span, 16) and span == span.lower() for span in found)
    assert len(ids.new_trace_id()) == 32


def test_a_forked_child_takes_other_ids_than_its_parent() -> None:
    ids.new_span_id()  # the batch is there: without care both would pop the same ones
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, ",".join(ids.new_span_id() for _ in range(20)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        theirs = set(answer.read().split(","))
    os.waitpid(child, 0)
    ours = {ids.new_span_id() for _ in range(200)}
    assert len(theirs) == 20
    assert not theirs & ours
