"""No secret of a known form is recorded, and what is none stays as it was."""

from __future__ import annotations

import base64
import hashlib
import random
import resource
import string
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_guard.evidence.redact import REDACTED, is_random, is_secret_name, redact, redact_arguments

_DRAW = random.Random(7)  # the tests' own letters: nothing here is a key of anything


def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(_DRAW.choices(alphabet, k=count))


UPPER = string.ascii_uppercase + string.digits
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{letters(64)}\n{letters(64)}\n"

SECRETS = {
    "aws id": ("aws s3 ls # {}", "AKIA" + letters(16, UPPER)),
    "aws session id": ("id={}", "ASIA" + letters(16, UPPER)),
    "aws secret": ("aws_secret_access_key = {}", letters(40)),
    "aws secret alone": ("{} is it", "Xk7" + letters(37)),
    "aliyun": ("export X={}", "LTAI" + letters(20)),
    "google": ("?x={}&y=1", "AIza" + letters(35)),
    "github": ("git clone https://{}@github.example.org/a", "ghp_" + letters(36)),
    "gitlab": ("glab auth {}", "glpat-" + letters(20)),
    "slack": ("post {}", "xoxb-" + letters(24)),
    "hugging face": ("login {}", "hf_" + letters(34)),
    "openai": ("key is {}", "sk-proj-" + letters(40)),
    "jwt": ("it says {}", f"eyJ{letters(20)}.eyJ{letters(30)}.{letters(43)}"),
    "bearer": ("curl -H 'Authorization: Bearer {}' http://a", letters(12)),
    "bearer in prose": ("then send bearer {} with it", letters(24)),
    "basic": ("Authorization: Basic {}", base64.b64encode(b"user:pass").decode()),
    "basic in json": ('{{"Authorization": "Basic {}"}}', base64.b64encode(b"user:pass").decode()),
    "api key header": ("X-Api-Key: {}", letters(10)),
    "cookie": ("Cookie: session={}; theme=dark", letters(10)),
    "password in url": ("psql postgres://me:{}@db/x", "hunter2!"),
    "password with a colon in url": ("redis://:{}@cache:6379/0", "a:b:c:9"),
    "token in url": ("https://{}@git.example.org/r", letters(24)),
    "assigned": ("PGPASSWORD={} psql", "hunter2"),
    "assigned in json": ('{{"db_password": "{}", "n": 1}}', "hunter2"),
    "assigned in escaped json": ('{{\\"db_password\\": \\"{}\\"}}', "hunter2"),
    "assigned in python": ("client = Client(api_key='{}')", "abcd1234"),
    "assigned in yaml": ("passphrase: {}\nx: 1", "correcthorse"),
    "walrus": ("if (secret := '{}'):", "abcd1234"),
    "option": ("tool --token {} run", "abcd1234"),
    "option with equals": ("tool --db-password={} run", "abcd1234"),
    "sshpass": ("sshpass -p {} ssh host", "hunter2"),
    "curl": ("curl -u me:{} http://a", "hunter2"),
    "query": ("http://a/?access_token={}&x=1", "abcdef123456"),
    "pem": ("key:\n{}rest", PEM + "-----END RSA PRIVATE KEY-----\n"),
    "pem cut short": ("{}", PEM),
    "openssh": ("{}", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{letters(70)}\n-----END OPENSSH PRIVATE KEY-----"),
    "random": ("use {} for it", "aB3" + letters(40)),
    "random with slashes": ("use {} for it", "aB3" + letters(20) + "/" + letters(16) + "+" + letters(8)),
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_a_known_form_is_taken_out(name: str) -> None:
    around, secret = SECRETS[name]
    found = redact(around.format(secret))
    assert REDACTED in found
    for piece in filter(lambda piece: len(piece) > 3, secret.split("\n") if "BEGIN" in secret else [secret]):
        if not piece.startswith("-----"):
            assert piece not in found
    assert redact(found) == found, "once is enough"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ls -la /usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0",
        f"git checkout {hashlib.sha1(b'x').hexdigest()}",
        f"sha256:{hashlib.sha256(b'x').hexdigest()}",
        str(uuid.UUID(int=7 << 90)),
        "pip install --index-url http://127.0.0.1:8080/simple six==1.16.0",
        "max_tokens=4096 tokenizer=AutoTokenizer.from_pretrained(name)",
        "tokens: 12",
        "password is null: password = None",
        "https://example.org/a:b@c",
        "examples/rome/SomeThing2/AnotherThing/ThirdOne/x86_64/UpperCase",
        "ssh -R 2222:localhost:22 user@198.51.100.7",
        "from transformers import Qwen2MoeForConditionalGenerationOutputWithPast",
        "/home/user/Projects2026/SomeLongDirectoryName/AnotherOne/File3.py",
        "test_that_the_Supervisor_closes_open_spans_of_2_dead_actors",
        "the bearer of news",
        "def test(): assert authorizationOfThing",
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAaaa111",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text


def test_what_stands_beside_a_secret_stays() -> None:
    assert (
        redact("psql postgres://me:hunter2@db.example.org:5432/x")
        == f"psql postgres://me:{REDACTED}@db.example.org:5432/x"
    )
    assert redact("X=1 PGPASSWORD=hunter2 psql -h db") == f"X=1 PGPASSWORD={REDACTED} psql -h db"
    assert redact('{"a": 1, "token": "abcdef", "b": 2}') == f'{{"a": 1, "token": "{REDACTED}", "b": 2}}'


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        (("mysql", "--password", "hunter2", "db"), ("mysql", "--password", REDACTED, "db")),
        (("mysql", "--password=hunter2"), ("mysql", f"--password={REDACTED}")),
        (("curl", "-u", "me:hunter2", "http://a"), ("curl", "-u", f"me:{REDACTED}", "http://a")),
        (("/usr/bin/sshpass", "-p", "hunter2", "ssh", "h"), ("/usr/bin/sshpass", "-p", REDACTED, "ssh", "h")),
        (("ssh", "-p", "2222", "h"), ("ssh", "-p", "2222", "h")),
        (("gh", "--token", "--help"), ("gh", "--token", "--help")),
        (("bash", "-c", "export API_KEY=abc123; ls"), ("bash", "-c", f"export API_KEY={REDACTED}; ls")),
        (("ls", "-u", "x"), ("ls", "-u", "x")),
        ((), ()),
    ],
)
def test_of_a_command_options_say_what_follows(given_: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert redact_arguments(given_) == kept


@pytest.mark.parametrize(
    "name", "password DB_PASSWORD api_key apiKey Authorization client_secret auth access-key Cookie".split()
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", "command author tokens tokenizer max_tokens keyboard compass path authentic".split())
def test_names_of_anything_else(name: str) -> None:
    assert not is_secret_name(name)


def test_random_words_are_told_from_chosen_ones() -> None:
    drawn = [letters(_DRAW.randrange(32, 65)) for _ in range(500)]
    missed = [word for word in drawn if not is_random(word)]
    assert len(missed) <= 15, "a guess, but a good one"


@settings(deadline=None)
@given(st.text(max_size=400))
def test_any_text_at_all_is_redacted_or_kept(text: str) -> None:
    found = redact(text)
    assert redact(found) == found or REDACTED in found


@pytest.mark.parametrize(
    "hostile",
    [
        "://" * 4000,
        "password" * 1500,
        "password=" * 1300,
        "-----BEGIN PRIVATE KEY-----" * 450,
        "authorization:" * 850,
        "a" * 12_000,
        "aB3" * 4000,
        "://" + "a" * 12_000,
        ("x-" + "a" * 24) * 460,
        "--" + "a-" * 6000,
        "eyJ" * 4000,
        "bearer " * 1700,
        "set-cookie: " * 1000,
        "\\\"'" * 4000,
        " " * 12_000,
    ],
)
def test_no_text_makes_it_slow(hostile: str) -> None:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_utime
    redact(hostile)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_utime - before < 0.5, "seconds of its own processor time"
