"""A static web site on 127.0.0.1:PORT, or on the socket that was handed over. Usage: site.py PORT DIRECTORY"""

import functools
import http.server
import os
import socket
import sys

port, directory = int(sys.argv[1]), sys.argv[2]
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=directory)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler, bind_and_activate=False)
server.socket.close()
if os.environ.get("LISTEN_FDS"):
    server.socket = socket.socket(fileno=3)
else:
    server.socket = socket.create_server(("127.0.0.1", port), backlog=128)
server.serve_forever()
