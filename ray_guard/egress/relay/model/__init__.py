"""Model calls: the relay as an HTTP server towards a tool and a client of the engine's OpenAI server. In the mover.

Nothing of what a tool writes reaches the engine as it was written: a request is read to its end, judged, and written
anew from what was understood.

    requests    what an HTTP client sends, by the strict reading alone
    answers     what the engine's server sends
    bodies      what a request asks for: how many tokens at most, and whether it reaches out
    dialogue    one connection: question, admission, answer, what it used. No I/O
    flow        the same with sockets, for the mover

Admission and accounts are the supervisor's (:mod:`ray_guard.supervisor.model_calls`).
"""
