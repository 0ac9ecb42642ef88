"""Downloads what a Llama needs from the Hugging Face Hub: checked before the first byte and after the last.

The files grow in `.NAME.download` beside the folder, which appears by one rename once every file has the size and the
hash that the Hub tells. What an interruption leaves stays there, and the same command goes on with it: within a file,
too, which `huggingface_hub` itself does not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from tpserve.convert.errors import ConvertError
from tpserve.convert.hub_files import HubFile, choose_files
from tpserve.convert.output_folder import check_out_dir

_MARKER = ".commit"  # in the unfinished folder: which state of which repository it is of
_READ_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def download(
    repo: str,
    to: str | os.PathLike[str],
    revision: str | None = None,
    include: str | None = None,
    *,
    endpoint: str | None = None,
) -> Path:
    """Downloads one form of a repository's weights, its tokenizer and its configuration.

    The token is `huggingface_hub`'s: of `HF_TOKEN`, or of `hf auth login`.

    Args:
        repo: such as `meta-llama/Llama-3.1-8B-Instruct`.
        to: the new folder; must not exist or be empty.
        revision: branch, tag or commit; None: the repository's main branch.
        include: pattern of the weights' names; None: see `choose_files`.
        endpoint: of the Hub; None: `HF_ENDPOINT`, or https://huggingface.co.

    Returns:
        `to`, absolute.

    Raises:
        ConvertError: the repository cannot be read, there is too little room, the transfer broke off, or a file is
            not what the Hub says it is; the message says what to do.
    """
    target = Path(to).resolve()
    check_out_dir(target)
    with _explained(repo, revision):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    commit = str(info.sha)
    files = choose_files(repo, [_hub_file(repo, sibling) for sibling in info.siblings or []], include)
    partial = target.with_name(f".{target.name}.download")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            _keep_only(partial, f"{repo}@{commit}", files)
            _check_room(partial, files)
            for file in files:
                _fetch(repo, commit, file, partial, endpoint)
            for file in files:
                _verify(partial / file.name, file)
            (partial / _MARKER).unlink()
            partial.rename(target)
    except OSError as e:
        if e.errno in _DISK_FULL:
            raise ConvertError(f"the disk is full ({e.strerror}) while downloading to {partial}; {_AGAIN}") from e
        raise ConvertError(f"{e.filename or target} cannot be written: {e.strerror or e}; {_AGAIN}") from e
    return target


_AGAIN = "the same command goes on where this one stopped"


def _hub_file(repo: str, sibling: Any) -> HubFile:
    if sibling.size is None:
        raise ConvertError(f"the Hub does not tell the size of {repo}'s {sibling.rfilename}")
    return HubFile(sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


@contextlib.contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """The Hub's refusals as what to do about them; no message of theirs is passed on, so that no header can be."""
    page = f"https://huggingface.co/{repo}"
    login = "set HF_TOKEN, or run: hf auth login"
    try:
        yield
    except GatedRepoError:
        how = f"with a token of an account that has: {login}"
        raise ConvertError(f"{repo} is gated: accept its licence at {page}, and come {how}") from None
    except RevisionNotFoundError:
        raise ConvertError(f"{repo} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        why = "the token may not read it" if get_token() else f"it is private, in which case: {login}"
        raise ConvertError(f"{repo} does not exist on the Hub, or {why}") from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        if status in (401, 403):
            raise ConvertError(f"the Hub refuses {repo} (status {status}): {login}") from None
        raise ConvertError(f"the Hub cannot give {repo} now (status {status}); {_AGAIN}") from None
    except (OSError, ConvertError):
        raise  # of the disk
    except Exception as e:  # noqa: BLE001 - see the next line
        # Of whichever HTTP library this release of huggingface_hub has, or its opinion of the repository's name.
        said = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise ConvertError(f"{repo} cannot be downloaded ({type(e).__name__}: {said}); {_AGAIN}") from None


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Holds the unfinished folder for this process.

    Raises:
        ConvertError: another one has it.
    """
    fd = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConvertError(f"another download is writing {partial}; wait for its end") from None
        yield
    finally:
        os.close(fd)


def _keep_only(partial: Path, state: str, files: list[HubFile]) -> None:
    """Removes what an earlier download left and this one cannot go on with."""
    marker = partial / _MARKER
    same = marker.is_file() and marker.read_text(encoding="utf-8") == state
    wanted = {name for file in files for name in (file.name, f"{file.name}.part")} if same else set()
    for path in partial.iterdir():
        if path.name not in wanted | {_MARKER}:
            path.unlink()
    marker.write_text(state, encoding="utf-8")


def _check_room(partial: Path, files: list[HubFile]) -> None:
    missing = sum(file.size for file in files) - sum(p.stat().st_size for p in partial.iterdir() if p.name != _MARKER)
    free = shutil.disk_usage(partial).free
    if free < missing:
        raise ConvertError(
            f"{partial.parent} has {free:,} bytes free, the download needs {missing:,}; free some space or choose "
            "another folder (--to)"
        )


def _fetch(repo: str, commit: str, file: HubFile, folder: Path, endpoint: str | None) -> None:
    """Downloads a file, or the rest of it."""
    done, part = folder / file.name, folder / f"{file.name}.part"
    if done.exists():
        return
    with part.open("ab") as f:
        if f.tell() > file.size:
            f.truncate(0)
            f.seek(0)
        if f.tell() < file.size:
            with _explained(repo, commit):
                url = hf_hub_url(repo, file.path, revision=commit, endpoint=endpoint)
                token = get_token()
                place = get_hf_file_metadata(url, token=token, endpoint=endpoint).location
                headers = build_hf_headers(token=token)
                if urlsplit(place).netloc != urlsplit(url).netloc:
                    headers.pop("authorization", None)  # a storage's link is signed; the token is the Hub's only
                http_get(
                    place, f, resume_size=f.tell(), headers=headers, expected_size=file.size,
                    displayed_filename=file.name,
                )  # fmt: skip
        f.flush()
        os.fsync(f.fileno())
    part.rename(done)


def _verify(path: Path, file: HubFile) -> None:
    """Compares a file with what the Hub says of it, and removes it when it is another.

    Raises:
        ConvertError: it is; the message names both sizes or hashes.
    """
    size = path.stat().st_size
    found, expected = f"{size} bytes", f"{file.size} bytes"
    if size == file.size:
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as f:
            while piece := f.read(_READ_BYTES):
                digest.update(piece)
        found, expected = digest.hexdigest(), file.sha256 or file.blob_id or digest.hexdigest()
    if found != expected:
        path.unlink()
        raise ConvertError(
            f"{file.name} is damaged: it is {found}, the Hub says {expected}; it was removed, and the same command "
            "downloads it again"
        )
