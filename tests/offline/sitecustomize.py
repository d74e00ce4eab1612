"""No request leaves the machine in a test: whoever looks up a name or connects beyond it is refused and written down.

Python imports a module of this name when it starts, so this folder on PYTHONPATH covers every child process; tests/conftest.py
installs the same in the process of the tests. An audit hook sees the sockets of all libraries, and nothing can take it out again.
"""

import errno
import os
import re
import socket
import sys

LOG = "BLIP3O_TESTS_REQUESTS"
"""Environment variable: the file to which every attempt adds a line."""
DEAD_PORT = 9
"""Where the proxies of test environments point: a request that came this far was meant for elsewhere."""

_CONNECTS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_LOOKS_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_HERE = re.compile(r"127(\.\d{1,3}){3}|(::ffff:127(\.\d{1,3}){3})|::1|::|0\.0\.0\.0|localhost|", re.IGNORECASE)
_OWN_NAME = socket.gethostname()


def install() -> None:
    """For the rest of this process. Does nothing where the environment names no log."""
    if LOG in os.environ:
        sys.addaudithook(_refuse)


def is_here(host: object) -> bool:
    """Whether an address or a name is of this machine; None and "" are all of its addresses."""
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("utf-8", "replace")
    return host is None or host == _OWN_NAME or (isinstance(host, str) and _HERE.fullmatch(host.partition("%")[0]) is not None)


def _refuse(event: str, arguments: tuple) -> None:
    if event in _CONNECTS:
        endpoint, address = arguments
        if endpoint.family not in (socket.AF_INET, socket.AF_INET6) or address is None:
            return  # a file of this machine, or what is connected already
        if not isinstance(address, tuple) or (is_here(address[0]) and address[1] != DEAD_PORT):
            return
    elif event not in _LOOKS_UP or is_here(address := arguments[0]):
        return
    attempt = f"{event.removeprefix('socket.')} {address!r} by {' '.join(sys.orig_argv)!r:.300}"
    log = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{attempt}\n".encode("utf-8", "backslashreplace"))
    os.close(log)
    raise PermissionError(errno.EACCES, f"tests don't use the network: {attempt}")


if __name__ == "sitecustomize":
    install()
