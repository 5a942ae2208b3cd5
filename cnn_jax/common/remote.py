"""Addresses of buckets, such as gs://bucket/run: what opens them, and their errors as one line."""

import contextlib
import logging
import os
import textwrap
from collections.abc import Iterator
from typing import Any

from cnn_jax.common import extras
from cnn_jax.common.errors import CnnJaxError

# The package that reads addresses of this kind, and the extra of this project that has it.
_EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Seconds without a byte from the servers after which a request is tried again: gcsfs tries six times
# in all, s3fs five times, and botocore twice in each.
SILENCE = 20


def is_remote(path: object) -> bool:
    return "://" in str(path)


def opened(address: str) -> Any:
    """The file system of fsspec for `address`; it may raise ImportError and errors of many types."""
    import fsspec

    kind = address.partition("://")[0]
    options: dict[str, Any] = {}
    if kind in _EXTRAS:
        options["use_listings_cache"] = False
    if kind in ("gs", "gcs"):
        # Its search for the bucket's type takes a minute where only the bucket's files may be read.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback
        import aiohttp

        # By default it ends the copy of a file that takes more than five minutes.
        patience = aiohttp.ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)
        options["requests_timeout"] = patience
    if kind == "s3":
        # s3fs tries again by itself, but not after an answer 500: so botocore does once. With its
        # default of five tries, silence would take ten minutes.
        config = {"connect_timeout": SILENCE, "read_timeout": SILENCE}
        options["config_kwargs"] = config | {"retries": {"total_max_attempts": 2}}
    return fsspec.filesystem(kind, **options)


@contextlib.contextmanager
def answered(
    place: str, kind: type[CnnJaxError], verb: str = "read", missing_ok: bool = False
) -> Iterator[None]:
    """Turns what a bucket's package raises inside the context into an error of one line.

    FileExistsError passes: it answers a write that must not replace a file.

    Args:
      place: the address or the flag with it, for the message.
      kind: the class of the error.
      verb: what was tried: "read" or "written".
      missing_ok: ends the context quietly if there is no such file.
    """
    try:
        yield
    except (CnnJaxError, FileExistsError):
        raise
    except ImportError:
        address = place.rpartition("=")[2]
        scheme = address.partition("://")[0]
        package, extra = _EXTRAS.get(scheme, (f"a package for {scheme}://", ""))
        raise kind(f"{place}: {extras.missing(package, extra)}") from None
    except FileNotFoundError:
        if missing_ok:
            return
        raise kind(f"{place}: there is no such bucket or file") from None
    except Exception as error:  # the packages raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TimeoutError):  # gcsfs gives no reason
            reason = "no answer in time"
        reason = textwrap.shorten(reason, 200, placeholder=" ...")
        raise kind(f"{place}: cannot be {verb} ({reason})") from error
