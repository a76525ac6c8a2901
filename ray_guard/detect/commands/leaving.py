"""Commands that carry out what should stay. Runs later, and live. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from ray_guard.detect import Finding, Kind
from ray_guard.detect.commands.line import Line, host_of, is_loopback, is_outside
from ray_guard.detect.shell import NETCATS, Command

_SECRET: Final = re.compile(
    r"(?:^|[\s'\"=@:/~<>(,;])(?:\.ssh(?:/(?!config\b|known_hosts|authorized_keys)|(?=[\s'\")*]|$))|id_(?:rsa|ed25519|ecdsa|dsa|\*)(?!\w|\.pub)|"
    r"\.aws(?:/credentials|/?(?=[\s'\")*]|$))|\.netrc|\.git-credentials|\.docker/config\.json|\.kube(?:/config|/?(?=[\s'\")*]|$))|"
    r"\.config/gcloud|etc/shadow|etc/passwd|proc/(?:self|\d+)/environ|\.huggingface/token|huggingface/token|"
    r"\.pypirc|\.npmrc|\.env\b(?!\.example)|\.bash_history|\.zsh_history|serviceaccount/token|run/secrets/|wallet\.dat|\.gnupg|\*\.pem|\*\.key)"
)
_DROPS: Final = re.compile(
    r"(?i)\b(?:transfer\.sh|file\.io|0x0\.st|webhook\.site|requestbin\.\w+|pipedream\.net|pastebin\.com|paste\.rs|ix\.io|termbin\.com|sprunge\.us|"
    r"bashupload\.com|oshi\.at|catbox\.moe|gofile\.io|anonfiles\.com|temp\.sh|tmpfiles\.org|uguu\.se|discord(?:app)?\.com/api/webhooks|"
    r"api\.telegram\.org/bot|interactsh?\.\w+|oast\.\w+|burpcollaborator\.net|beeceptor\.com|pixeldrain\.com|filebin\.net|dpaste\.\w+|"
    r"hastebin\.com|c-v\.sh|keep\.sh|ngrok(?:-free)?\.(?:io|app|dev)|trycloudflare\.com|requestcatcher\.com|hookbin\.com|ptsv2\.com)"
)
_WEBHOOKS: Final = re.compile(
    r"(?i)\bhooks\.slack\.com/|webhook\.office\.com/|\bchat\.googleapis\.com/|\bhooks\.zapier\.com/"
)
"""Where ordinary jobs say how they fared: what is not said there is a file's content."""
_OF_FILE: Final = re.compile(r"\$\(\s*(?:cat|<|tar|base64|xxd|env|printenv)\b|\$\(<|`\s*(?:cat|base64)\b|=@")
_SHOWERS: Final = frozenset("cat tac head tail dd gzip bzip2 xz zstd base64 base32 xxd strings".split())
_ENVIRONMENT: Final = frozenset({"env", "printenv", "set", "export", "history"})
_ARCHIVES: Final = frozenset("tar zip 7z dd mysqldump pg_dump pg_dumpall mongodump cpio".split())
#: program, and what its arguments must show to say secrets
_SAYERS: Final = {
    "kubectl": r"\bget\s+secrets?\b",
    "aws": r"configure\s+export-credentials|secretsmanager\s+get|\bget-session-token|ssm\s+get-parameter",
    "gcloud": r"auth\s+print-\w*token|secrets\s+versions\s+access",
    "az": r"account\s+get-access-token|keyvault\s+secret\s+show",
    "gpg": r"--export-secret",
    "git": r"\bbundle\s+create\s+-|\bcredential\s+fill|\barchive\b",
    "docker": r"^(?:save|export)\b",
    "sqlite3": r"\.dump\b",
    "vault": r"\bread\b|kv\s+get",
    "pass": r"^show\b",
    "op": r"\bread\b|item\s+get",
    "gh": r"auth\s+token",
    "security": r"find-\w+-password",
    "find": r"-exec\b",
}
_ENCODERS: Final = frozenset("base64 base32 xxd uuencode basenc".split())
_NETCATS: Final = NETCATS | {"socat", "telnet"}
#: whose tokens are meant for whom
_TOKENS: Final = {
    r"AWS_(?:SECRET_ACCESS_KEY|SESSION_TOKEN)": r"amazonaws\.com",
    r"(?:HF_TOKEN|HUGGING_?FACE\w*TOKEN)": r"(?:huggingface\.co|hf\.co)",
    r"OPENAI_API_KEY": r"openai\.(?:com|azure\.com)|azure\.com",
    r"ANTHROPIC_API_KEY": r"anthropic\.com",
    r"(?:GITHUB_TOKEN|GH_TOKEN)": r"github(?:usercontent)?\.com",
    r"WANDB_API_KEY": r"wandb\.ai",
    r"GITLAB_TOKEN": r"gitlab",
    r"SSH_PRIVATE_KEY": r"(?!)",
}
_LITERAL_TOKEN: Final = re.compile(
    r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})|https?://[^:@\s/$]+:[^@\s/$]{3,}@"
)
_UPLOADED: Final = re.compile(
    r"(?:^|\s)(?:(?:-[A-Za-z]*T|--upload-file)[= ]?\s*(\S+)|(?:-\w*[Fd]|--(?:form|data\w*|data-\w+|json))[= "
    r"]?\s*\S*?@(\S+))"
)
_COPIERS: Final = {
    "aws": r"\bs3(?:api)?\b.*\b(?:cp|sync|mv|put-object)\b",
    "gsutil": r"\b(?:cp|rsync|mv)\b",
    "gcloud": r"\bstorage\b.*\b(?:cp|rsync|mv)\b",
    "az": r"\bupload\b|\bcopy\b",
    "azcopy": r"\b(?:copy|cp|sync)\b",
    "rclone": r"\b(?:copy|copyto|sync|move|moveto|rcat)\b",
    "mc": r"\b(?:cp|mirror|mv|pipe)\b",
    "s3cmd": r"\b(?:put|sync)\b",
    "s5cmd": r"\b(?:cp|sync|mv)\b",
    "b2": r"\bupload",
    "croc": r"\bsend\b",
    "wormhole": r"\bsend\b",
    "ffsend": r"\bupload\b",
    "magic-wormhole": r"\bsend\b",
    "hf": r"\bupload\b",
    "huggingface-cli": r"\bupload\b",
    "smbclient": r"\bput\b",
    "tftp": r"\bput\b",
    "ftpput": r".",
    "mail": r".",
    "mailx": r".",
    "mutt": r".",
    "sendmail": r".",
    "swaks": r".",
    "msmtp": r".",
    "http": r"@",
    "https": r"@",
    "xh": r"@",
    "gh": r"\bgist\b|\brelease\s+upload\b",
    "ipfs": r"\badd\b",
    "rsync": r".",
}
"""Programs that copy to elsewhere, and what their arguments must show to do so."""

_MAILERS: Final = frozenset("mail mailx mutt sendmail swaks msmtp".split())


def by_program(command: Command, line: Line) -> Finding | None:
    """What is sent, to whom, and where it comes from."""
    text = " ".join(command.arguments)
    if command.name == "git":
        return _pushed(text, line)
    if command.name == "tar" and re.search(r"(?:^|\s)[\w.-]+@[\w.-]+:\S", text):  # by rsh, or what stands for it
        return Finding(Kind.EXFILTRATION, "exfiltration.archive")
    if _is_here(text):
        return None
    return _computed(command, text) or _sent(command, text, line) or _on_device(command)


def _is_here(text: str) -> bool:
    """Whether it speaks to this host alone."""
    return is_loopback(text) and not re.search(r"(?:^|\s)--?(?:proxy|x|preproxy|socks5\S*)\b", text)


def _pushed(text: str, line: Line) -> Finding | None:
    pushes = re.search(r"(?:^|\s)push\b", text) or (
        re.match(r"remote\s+(?:add|set-url)\b", text) and " push" in line.text
    )
    if pushes and _LITERAL_TOKEN.search(text):
        return Finding(Kind.EXFILTRATION, "exfiltration.git_token")
    return None


def _computed(command: Command, text: str) -> Finding | None:
    """Secrets that stand in the place of an argument."""
    if command.name not in ("curl", "wget", "whois", "finger", "ping", "http", "nslookup", "dig"):
        return None
    if "kubernetes.default" in text:
        return None
    computed = " ".join(re.findall(r"\$\([^)]*\)?|`[^`]*`", text))
    if _SECRET.search(computed) or re.search(r"[(`]\s*(?:env|printenv|history)\b", computed):
        return Finding(Kind.EXFILTRATION, "exfiltration.secret")
    if command.name == "ping" and re.search(r"(?:^|\s)-p\s*(?:\$|`|[0-9a-f]{16})", text):
        return Finding(Kind.EXFILTRATION, "exfiltration.ping")
    if re.search(r"gopher://[^/\s]{1,253}/_", text):  # bare bytes in the place of a path
        return Finding(Kind.EXFILTRATION, "exfiltration.bare_connection")
    if command.name in ("curl", "wget"):
        told = re.sub(r"(?i)(?:authorization|private-token|x-[\w-]*(?:key|token))\s*:\s*\S+(?:\s+\S+)?", "", text)
        for token, owners in _TOKENS.items():
            if re.search(rf"\$\{{?{token}\b", told) and not re.search(owners, text):
                return Finding(Kind.EXFILTRATION, "exfiltration.token")
    return None


def _sent(command: Command, text: str, line: Line) -> Finding | None:
    sends = _what_is_sent(command, text)
    if sends is None:
        return None
    if any(_SECRET.search(f" {each} ") for each in sends):
        return Finding(Kind.EXFILTRATION, "exfiltration.secret")
    if _DROPS.search(text):
        return Finding(Kind.EXFILTRATION, "exfiltration.drop")
    if _WEBHOOKS.search(text) and _OF_FILE.search(text):
        return Finding(Kind.EXFILTRATION, "exfiltration.webhook")
    if command.name not in ("curl", "wget") and _is_bare(command) and _contents(command) - line.named_pipes:
        return Finding(Kind.EXFILTRATION, "exfiltration.bare_connection")
    named = {each.rpartition("/")[2].strip("'\"") for each in sends} - {""}
    if _staged(named, line) or (_stands_for_files(sends) and _SECRET.search(f" {line.text} ")):
        return Finding(Kind.EXFILTRATION, "exfiltration.staged")
    if command.name in ("curl", "wget") and _has_file(text) and any(map(is_outside, _hosts(command))):
        return Finding(Kind.EXFILTRATION, "exfiltration.file_to_address")
    if command.name in ("rclone", "aws") and re.search(
        r":(?:s3|sftp|ftp|webdav|http)[,:]|--no-sign-request|--endpoint-url[= ]https?://\d", text
    ):
        return Finding(Kind.EXFILTRATION, "exfiltration.remote_of_its_own")
    return _from_pipe(command)


def _from_pipe(command: Command) -> Finding | None:
    encoded = False
    for source in command.sources():
        if _SECRET.search(f" {source.text} {' '.join(source.redirects)} ") or source.name in _ENVIRONMENT:
            return Finding(Kind.EXFILTRATION, "exfiltration.secret")
        if source.name in _SAYERS and re.search(_SAYERS[source.name], " ".join(source.arguments)):
            return Finding(Kind.EXFILTRATION, "exfiltration.secret")
        if source.name in _ARCHIVES and command.name not in _MAILERS:
            return Finding(Kind.EXFILTRATION, "exfiltration.archive")
        encoded = encoded or (
            source.name in _ENCODERS and not re.search(r"(?:^|\s)(?:-\w*[dDr]|--decode)\b", source.text)
        )
    if encoded and command.name not in ("ssh", "aws", "gsutil", *_MAILERS):
        return Finding(Kind.EXFILTRATION, "exfiltration.encoded")
    return None


def _what_is_sent(command: Command, text: str) -> list[str] | None:
    """The arguments and files that a program hands to the far side; None: it hands over nothing."""
    read = [each.partition("<")[2] for each in command.redirects if "<" in each and "<&" not in each]
    if command.name in ("curl", "wget"):
        return _posted(command, text, read)
    if command.name in _NETCATS or (command.name == "openssl" and "s_client" in command.arguments):
        files = [
            word.partition(":")[2] for word in command.arguments if re.match(r"(?i)(?:file|open|gopen|create):", word)
        ]
        return [*read, *files] if command.piped_from is not None or read or files else None
    if command.name in ("scp", "rsync", "sftp", "ftp", "lftp"):
        return _copied(command, read)
    if command.name == "ssh":
        return read if command.piped_from is not None or read else None
    if command.name in _COPIERS and re.search(_COPIERS[command.name], text):
        return [*command.arguments, *read, *command.documents]
    return None


def _posted(command: Command, text: str, read: list[str]) -> list[str] | None:
    if command.name == "wget":
        return [text] if "--post" in text or "--body" in text else None
    if re.search(r"(?:^|\s)(?:-[A-Za-z]*[TFd]\b|-[A-Za-z]*[TFd]\S|--(?:data|upload-file|form|json)\S*)", text):
        return [text, *read]
    if command.piped_from is not None and "{}" in text:  # xargs
        return [text]
    return None


def _copied(command: Command, read: list[str]) -> list[str] | None:
    words, at = [], 0
    while at < len(command.arguments):
        word = command.arguments[at]
        if re.fullmatch(r"-[iFoPceJlS]|--(?:rsh|exclude|include|filter|exclude-from|files-from|password-file)", word):
            at += 1  # its value is no file that is copied (a key that scp itself uses)
        elif not word.startswith("-"):
            words.append(word)
        at += 1
    if command.name in ("sftp", "ftp", "lftp"):
        said = " ".join([*command.arguments, *command.documents])
        return [said] if re.search(r"\bm?put\b|\bmirror\s+-R", said) or command.piped_from is not None else None
    remote = bool(words) and re.match(r"(?:[\w.@-]+:(?!\\)|(?:scp|rsync|sftp)://)", words[-1])
    return [*words[:-1], *read] if remote else None


def _has_file(text: str) -> bool:
    return _UPLOADED.search(text) is not None or "--post-file" in text or "--body-file" in text


def _hosts(command: Command) -> Iterator[str]:
    for word in command.arguments:
        if not word.startswith("-") and ("." in word or ":" in word):
            yield host_of(word)


def _stands_for_files(sends: list[str]) -> bool:
    return any(re.search(r"@?(?:\{\}|\"?\$\{?\w+)", each) for each in sends)


def _staged(named: set[str], line: Line) -> bool:
    """Whether another program of the line put secrets into what is sent."""
    sent = " ".join(named)
    for other in line.commands:
        if other.name in (
            "tar",
            "zip",
            "cp",
            "cat",
            "base64",
            "gzip",
            "openssl",
            "gpg",
            "7z",
            "mv",
            "rsync",
            "xxd",
            "dd",
        ):
            said = f" {other.text} {' '.join(other.redirects)} "
            if not _SECRET.search(said):
                continue
            made = {each.rpartition("/")[2] for each in re.split(r"[\s=>]", said) if "/" in each or "." in each}
            if any(len(each) > 1 and not _SECRET.search(f"/{each} ") and each in sent for each in made):
                return True
    return False


def _is_bare(command: Command) -> bool:
    """Whether it hands its input to a connection as it is."""
    return command.name in _NETCATS or (command.name == "openssl" and "s_client" in command.arguments)


def _contents(command: Command) -> set[str]:
    """The files whose contents come to a program by its input: nothing that is said, and no device."""
    files: set[str] = set()
    for source in (command, *command.sources()):
        read = [each.partition("<")[2] for each in source.redirects if re.match(r"\d*<[^<&>]", each)]
        if source is not command and source.name in _SHOWERS:
            read += [word.removeprefix("if=") for word in source.arguments if word[:1] != "-" and not word.isdigit()]
        read += re.findall(r"(?i)^(?:file|open|gopen):(.+)", "\n".join(source.arguments), re.MULTILINE)
        read += re.findall(r"\$\((?:<|cat\s)\s*([^)]+)\)", " ".join(source.arguments))
        files.update(each for each in read if not each.startswith(("/dev/", "`tty", "$(tty")))
    return files


def _on_device(command: Command) -> Finding | None:
    """A secret or a file that is written to ``/dev/tcp``, or a secret to a descriptor of it."""
    to_device = any(">" in each and re.search("/dev/(?:tcp|udp)/", each) for each in command.redirects)
    shown = command.name in _SHOWERS and any(word[:1] != "-" for word in command.arguments)
    if to_device and (shown or _contents(command)):
        return Finding(Kind.EXFILTRATION, "exfiltration.dev_tcp")
    said = f" {' '.join(command.arguments)} {' '.join(each for each in command.redirects if '<' in each)} "
    if not _SECRET.search(said) and not (command.piped_from and _SECRET.search(f" {command.piped_from.text} ")):
        return None
    if to_device:
        return Finding(Kind.EXFILTRATION, "exfiltration.dev_tcp")
    if any(re.match(r"\d*>&[3-9]", each) for each in command.redirects):
        return Finding(Kind.EXFILTRATION, "exfiltration.descriptor")
    return None
