"""Another process of the run that is gone is noticed by its connection, which the system closes however it ended.

Gloo notices by itself. NCCL waits for its own limit, ten minutes unless told otherwise, in a call that nothing interrupts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator

from accelerate import PartialState

from genflow.training.ranks import from_main, gone

COMING = 30.0  # seconds for the others to connect; who cannot, behind a firewall, is not watched
GRACE = 10.0  # seconds for this process to end by itself
GOODBYE = b"."


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process with one line and code 2 where another one has gone within without having left it whole."""
    peers = _peers()
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(peers, left), daemon=True)
    thread.start()
    try:
        yield
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.send(GOODBYE)
    finally:
        left.set()
        _hang_up(peers)
        thread.join()
        for peer in peers:
            peer.close()


def _peers() -> list[socket.socket]:
    """Connections: the main process's to all others, theirs to it."""
    state = PartialState()
    if state.num_processes == 1 or "MASTER_ADDR" not in os.environ:
        return []
    if state.is_main_process:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=state.num_processes) as server:
            word = secrets.token_bytes(16)
            from_main((server.getsockname()[1], word))
            return _accepted(server, word, state.num_processes - 1)
    port, word = from_main((0, b""))
    with contextlib.suppress(OSError):
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=COMING)
        peer.sendall(word)
        return [peer]
    return []


def _accepted(server: socket.socket, word: bytes, number: int) -> list[socket.socket]:
    """So many connections of those who know the word, or as many as come in time."""
    peers: list[socket.socket] = []
    server.settimeout(COMING)
    with contextlib.suppress(TimeoutError):
        while len(peers) < number:
            peer, _ = server.accept()
            peer.settimeout(COMING)
            with contextlib.suppress(OSError):
                if peer.recv(len(word), socket.MSG_WAITALL) == word:
                    peers.append(peer)
                    continue
            peer.close()
    return peers


def _watch(peers: list[socket.socket], left: threading.Event) -> None:
    with selectors.DefaultSelector() as ready:
        for peer in peers:
            ready.register(peer, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(OSError):
                    if key.fileobj.recv(1) == GOODBYE:
                        ready.unregister(key.fileobj)
                        continue
                _hang_up(peers)  # so that all hear of it
                if not left.wait(GRACE):
                    print(f"genflow: {gone(PartialState().process_index)}", file=sys.stderr, flush=True)
                    os._exit(2)
                return


def _hang_up(peers: list[socket.socket]) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
