#!/bin/sh
# What `make run` does: says what to type next, then runs the gateway in the foreground.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
PORT=${PORT:-8000}
export PORT SITE_PORT=$((PORT + 1)) TIME_PORT=$((PORT + 2)) BACKEND_PORT=$((PORT + 100))
export DORMANT_SOCKET="${XDG_RUNTIME_DIR:-/tmp}/dormant-quickstart-$PORT.sock"
cat <<EOF
Three services, asleep on the ports $PORT to $TIME_PORT ($BACKEND_PORT is the web server's own; if one is taken:
make run PORT=9000). In a second terminal:

    export DORMANT_SOCKET=$DORMANT_SOCKET
    $(command -v dormant) status --watch

and in a third one wake them:

    curl http://127.0.0.1:$PORT/            # a web site, relayed
    curl http://127.0.0.1:$SITE_PORT/            # the same site, on a socket that was handed over
    nc 127.0.0.1 $TIME_PORT </dev/null          # one process for each connection

They sleep again some seconds later. Ctrl-C ends it.

EOF
exec dormant run "$here/../quickstart.yaml"
