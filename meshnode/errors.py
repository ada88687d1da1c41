"""Every error meshnode raises, in one tree.

    MeshnodeError
    ├── ConfigError             usage or settings are wrong; nothing was started (exit 2)
    │   ├── TokenInvalid        the token is damaged or missing
    │   ├── IdentityDamaged     identity.key can't be read; it is left untouched
    │   └── ListenFailed        an address can't be bound (taken, not ours, not permitted)
    ├── WireError               a peer broke a protocol; ``code`` is the SPEC's word for it
    ├── MeshError               something between this node and a peer
    │   ├── PeerUnreachable     no connection could be made, or it ended before an answer
    │   │   ├── PeerLate          somebody listens there, but did not get round to an answer in time
    │   │   ├── OutOfDescriptors  not for want of the other side: no more files can be opened here
    │   │   └── NoSuchPeer      nobody, or no single one, has that peer ID or name
    │   ├── PeerRefused         the peer said no (protocol not served, not a member)
    │   ├── TokenRefused        the peer, or we, don't accept the other's token (exit 5)
    │   ├── StreamReset         a stream or its connection was cut: what was read is not whole
    │   └── StreamClosed        our own bug or shutdown: the stream was already closed here
    ├── ProbeFailed             a service of this host does not answer as it should
    ├── NoCandidate             nobody can serve the request (exit 4)
    │   ├── UnknownModel        nobody has the model that it names; ``near`` lists like names
    │   ├── AllFull             those who could are all full just now: wait, or come back
    │   │   └── RetriesSpent    too much is retried already: wait, or say why it failed
    │   └── Overloaded          no place in the waiting room, or none came free in time (HTTP 503)
    ├── ParseError              a client's request can't be understood (HTTP 400)
    ├── GpuReadError            free VRAM can't be read; ``code`` says why
    ├── StateDamaged            a file that can be lost is not what it should be: set it aside
    └── NodeNotRunning          no control API answers (exit 3)

Foreign exceptions are translated once, at the seam where they arise, with ``from``.
"""

from __future__ import annotations


class MeshnodeError(Exception):
    """Base of all; its text says what, why and what to do next."""

    exit_code = 1


class ConfigError(MeshnodeError):
    """Usage or settings are wrong; nothing was started."""

    exit_code = 2


class TokenInvalid(ConfigError):
    """The token is damaged, of another version, or missing."""


class IdentityDamaged(ConfigError):
    """The identity file can't be read as a key; it is left untouched."""


class ListenFailed(ConfigError):
    """An address can't be bound."""


class WireError(MeshnodeError):
    """Bytes from a peer that break a protocol.

    ``code`` is the error code that the protocol's SPEC.md names for this fault.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class MeshError(MeshnodeError):
    """Something went wrong between this node and a peer."""


class PeerUnreachable(MeshError):
    """No connection to the peer could be made, or it ended before an answer came."""


class PeerLate(PeerUnreachable):
    """A connection was taken, but no answer came in time: the peer is stopped, or just busy."""


class OutOfDescriptors(PeerUnreachable):
    """This process, or this host, can open no more files; the other side is not to blame."""


class NoSuchPeer(PeerUnreachable):
    """Nobody has the peer ID or name that was asked for, several have it, or it is this node."""


class PeerRefused(MeshError):
    """The peer answered and said no."""


class TokenRefused(MeshError):
    """One side doesn't accept the other's token."""

    exit_code = 5


class StreamReset(MeshError):
    """The stream was reset or its connection died; what was read is cut short."""


class LinkLost(StreamReset):
    """The connection to the peer ended while the stream was open: the peer did not cut it."""


class StreamClosed(MeshError):
    """The stream was already closed on this side."""


class ProbeFailed(MeshnodeError):
    """A service of this host does not answer as it should.

    ``is_certain`` where the service itself said so, or nothing listens there; not where it was
    late or unreadable, which a busy one may be.
    """

    def __init__(self, message: str, *, is_certain: bool) -> None:
        super().__init__(message)
        self.is_certain = is_certain


class NoCandidate(MeshnodeError):
    """Nobody can serve the request."""

    exit_code = 4


class UnknownModel(NoCandidate):
    """Nobody in the mesh has the model that the request names; ``near`` lists like names."""

    def __init__(self, message: str, *, model: str, near: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.model = model
        self.near = near


class AllFull(NoCandidate):
    """Peers could serve the request, but all of them have as many as they take just now."""


class RetriesSpent(AllFull):
    """So many requests are being retried already that one more would feed a storm."""


class Overloaded(NoCandidate):
    """All were full for too long, or too many wait already.

    ``retry_after`` is the number of whole seconds after which asking again may help.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ParseError(MeshnodeError):
    """A client's request that can't be understood; ``param`` is the field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GpuReadError(MeshnodeError):
    """Free VRAM can't be read; ``code`` is short and stable, fit for a metric label."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StateDamaged(MeshnodeError):
    """A file of the state folder that can be lost is not what it should be; set it aside."""


class NodeNotRunning(MeshnodeError):
    """No node's control API answers."""

    exit_code = 3
