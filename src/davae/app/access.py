"""Access to the page: host names, origins, a token and a password."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from davae.errors import RunError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
PLACE = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[0-9A-Za-z_.-]{1,254}))(?::(?P<port>[0-9]{1,5}))?")
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class HostPort:
    """A host in lower case without a final dot or brackets, and the port where one is written."""

    host: str
    port: int | None


def parse_host(text: str) -> HostPort | None:
    """Parse the value of a Host header, None for anything but one host with or without a port.

    Args:
        text: `name`, `name:port`, `1.2.3.4:port` or `[::1]:port`.
    """
    found = PLACE.fullmatch(text)
    if found is None:
        return None
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port < 65536:
        return None
    if found["six"]:
        try:
            return HostPort(str(ipaddress.IPv6Address(found["six"])), port)
        except ValueError:
            return None
    host = found["name"].lower().removesuffix(".")
    return HostPort(host, port) if NAME.fullmatch(host) else None


def same_origin(origin: str, host: HostPort) -> bool:
    """Return whether an Origin header names the host of the Host header.

    A sandboxed frame, a local file and a redirect across sites send `null`, which is refused.

    Args:
        origin: the header.
        host: from the Host header.
    """
    scheme, separator, rest = origin.partition("://")
    standard = PORTS.get(scheme.lower())
    place = parse_host(rest) if separator and standard else None
    if place is None:
        return False
    return (place.host, place.port or standard) == (host.host, host.port or standard)


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reachable from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Return whether an address to listen on names every address of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def checked_host(text: str, option: str) -> str:
    """Normalise a host name or address that the owner wrote for an option.

    Args:
        text: the value.
        option: its name, for the message.

    Raises:
        RunError: not a host name; with a port, a scheme or a wildcard.
    """
    try:
        written = str(ipaddress.ip_address(text.strip("[]")))
        place = parse_host(f"[{written}]" if ":" in written else written)
    except ValueError:
        try:
            place = parse_host(text.encode("idna").decode("ascii"))
        except UnicodeError:
            place = None
    if place is None or place.port is not None:
        raise RunError(f"{option}: '{text}' is not a host name; write a name or an address without scheme and port")
    return place.host


def read_auth(auth: str | None, file: Path | None) -> str | None:
    """Return `user:password` from an option or the first line of a file, None without either.

    Args:
        auth: value of `--auth`.
        file: value of `--auth-file`.

    Raises:
        RunError: both, a file that others may read, or a value without a user or a password.
    """
    if auth is not None and file is not None:
        raise RunError("--auth: given twice; use either --auth or --auth-file")
    option = "--auth" if file is None else "--auth-file"
    if file is not None:
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise RunError(f"--auth-file: others may read {file}; use: chmod 600 {file}")
            auth = (file.read_text(encoding="utf-8").splitlines() or [""])[0]
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"--auth-file: {file} cannot be read; write one line user:password into it") from error
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password or not auth.isprintable():
        raise RunError(f"{option}: not a user and a password; write user:password")
    return auth


@dataclass(frozen=True)
class Access:
    """Names that the page answers to, and secrets that a request must carry.

    Attributes:
        host: address to listen on.
        names: host names that a request may carry besides those of this machine.
        token: secret of the printed address.
        auth: `user:password`, required besides the token.
    """

    host: str = "127.0.0.1"
    names: frozenset[str] = frozenset()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    auth: str | None = field(default=None, repr=False)

    @property
    def cookie(self) -> str:
        """Name of the cookie, different for each page.

        Pages on other ports of one host share cookies.
        """
        return f"davae-{hashlib.sha256(self.token.encode()).hexdigest()[:12]}"

    @property
    def cookie_value(self) -> str:
        """Value of the cookie, from which the token cannot be derived."""
        return hmac.new(self.token.encode(), b"davae app cookie", hashlib.sha256).hexdigest()

    def address(self, port: int) -> str:
        """Return the address to print, with the token."""
        host = "127.0.0.1" if is_wildcard(self.host) else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={self.token}"

    def answers_to(self, host: HostPort, own_address: str | None) -> bool:
        """Return whether a request for a host is meant for this page.

        A foreign name that resolves to this machine (DNS rebinding) is not. Where the page listens on every
        address, the address that a connection arrived at is: an address in a Host header cannot be rebound.

        Args:
            host: from the Host header.
            own_address: address of this machine that the connection arrived at.
        """
        if host.host in LOCAL_NAMES | self.names:
            return True
        return is_wildcard(self.host) and own_address is not None and host.host == _unmapped(own_address)

    def has_token(self, token: str | None, cookie: str | None, authorization: str | None) -> bool:
        """Return whether the query, the cookie or the header of a request carries the secret.

        Args:
            token: of the query.
            cookie: of this page's name.
            authorization: the header.
        """
        scheme, _, bearer = (authorization or "").partition(" ")
        in_header = scheme.lower() in ("token", "bearer") and _equal(bearer.strip(), self.token)
        in_query = token is not None and _equal(token, self.token)
        return in_header | in_query | (cookie is not None and _equal(cookie, self.cookie_value))

    def has_password(self, authorization: str | None) -> bool:
        """Return whether a request carries the user and the password, True where none is required."""
        if self.auth is None:
            return True
        scheme, _, encoded = (authorization or "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given, self.auth.encode())


def _unmapped(address: str) -> str:
    """Return an address of this machine as a Host header has it, `::ffff:1.2.3.4` as `1.2.3.4`."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _equal(found: str, wanted: str) -> bool:
    return hmac.compare_digest(found.encode("utf-8", "surrogatepass"), wanted.encode())


def grant(host: str = "127.0.0.1", allow_hosts: Iterable[str] = (), auth: str | None = None) -> Access:
    """Return the access of a page that listens on `host`, with a new token.

    Args:
        host: address to listen on.
        allow_hosts: further names of the page.
        auth: `user:password`.

    Raises:
        RunError: a name that is not a host name, or an address that other machines reach without a password.
    """
    name = checked_host(host, "--host")
    names = {checked_host(allowed, "--allow-host") for allowed in allow_hosts}
    if not is_wildcard(name):
        names.add(name)
    if not is_loopback(name) and auth is None:
        raise RunError(
            f"--host: other machines reach {host}; give --auth user:password (or DAVAE_APP_AUTH, --auth-file), "
            "or leave --host and use an SSH tunnel"
        )
    return Access(name, frozenset(names), auth=auth)


def private_environment() -> None:
    """Remove the password from the environment, which trainings inherit."""
    os.environ.pop("DAVAE_APP_AUTH", None)
