#!/bin/sh
# A static web site on 127.0.0.1:PORT: nginx when it is installed, otherwise Python's own server.
# With sockets handed over (LISTEN_FDS) it serves on those instead. Usage: site.sh PORT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin
if ! command -v nginx >/dev/null; then
    exec python3 "$here/site.py" "$1" "$here/www"
fi
dir=$(mktemp -d)
user=
if [ "$(id -u)" = 0 ]; then
    user="user root;"   # whoever else it would be may not enter this folder
fi
cat >"$dir/nginx.conf" <<EOF
$user pid $dir/pid; error_log stderr; daemon off; worker_processes 1;
events {}
http {
    access_log off; default_type text/html;
    client_body_temp_path $dir/a; proxy_temp_path $dir/b; fastcgi_temp_path $dir/c; uwsgi_temp_path $dir/d; scgi_temp_path $dir/e;
    server { listen 127.0.0.1:$1; root $here/www; }
}
EOF
# nginx takes over listening sockets that this variable names: how it upgrades itself, and how it can be socket activated.
if [ -n "${LISTEN_FDS:-}" ]; then
    export NGINX="3;"
fi
trap 'rm -rf "$dir"' EXIT
trap 'kill -TERM "$nginx" 2>/dev/null' TERM INT
nginx -e stderr -p "$dir" -c "$dir/nginx.conf" &
nginx=$!
wait "$nginx" || wait "$nginx" || true
