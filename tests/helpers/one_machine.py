# SPDX-License-Identifier: Apache-2.0
"""A command whose process connects to this machine alone: `python one_machine.py TABLE LOG serve ...`.

Names are looked up in a table, and a connection to any other address than the server's own goes to a recorder on the
loopback address. Both are written down first. Whatever would connect elsewhere still is refused by an audit hook.

The table is JSON: `names` with a list of answers for each name, one a question and the last one for good; `recorders`
with a port of this machine for each `ADDRESS PORT`.
"""

import ipaddress
import json
import socket
import sys
import threading


# it has sockets of its own, which nothing here would see
sys.modules["uvloop"] = None  # type: ignore[assignment]
LOCK = threading.Lock()


def install(table_path: str, log_path: str):
    """Puts the table in the place of the resolver and of the network."""
    with open(table_path) as file:
        table = json.load(file)
    asked = dict.fromkeys(table["names"], 0)
    getaddrinfo, connect = socket.getaddrinfo, socket.socket.connect

    def write(**entry):
        with LOCK, open(log_path, "a") as log:
            log.write(json.dumps(entry) + "\n")

    def patched_getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in table["names"]:
            if name is not None and not is_address(name) and name != "localhost":
                write(resolved=name)
                raise socket.gaierror(socket.EAI_NONAME, "no such name in the table")
            return getaddrinfo(host, port, family, type, proto, flags)
        with LOCK:
            answers = table["names"][name]
            address = answers[min(asked[name], len(answers) - 1)]
            asked[name] += 1
        write(resolved=name)
        return getaddrinfo(address, port, family, type, proto, flags)

    def patched_connect(sock, address):
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return connect(sock, address)
        host, port = address[:2]
        write(connected=f"{host} {port}")
        local = table["recorders"].get(f"{host} {port}")
        if local is None:
            raise ConnectionRefusedError(f"no recorder for {host} {port}")
        if sock.family == socket.AF_INET6:
            return connect(sock, ("::ffff:127.0.0.1", local, 0, 0))
        return connect(sock, ("127.0.0.1", local))

    def refuse_elsewhere(event, arguments):
        if event != "socket.connect" or arguments[0].family not in (socket.AF_INET, socket.AF_INET6):
            return
        address = ipaddress.ip_address(arguments[1][0])
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
            write(escaped=str(arguments[1]))
            raise PermissionError(f"nothing here connects to {arguments[1]}")

    sys.addaudithook(refuse_elsewhere)
    socket.getaddrinfo = patched_getaddrinfo
    socket.socket.connect = patched_connect


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    install(*sys.argv[1:3])
    from modeling_moma.cli.main import main

    sys.exit(main(sys.argv[3:]))
