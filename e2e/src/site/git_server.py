"""Serves the bare repositories below a folder through git's own smart HTTP program: to everybody, and on a second port to
those who have the password. Usage: git_server.py ROOT PORT LOCKED_PORT USER:PASSWORD"""

import base64
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT, PORT, LOCKED_PORT, CREDENTIALS = sys.argv[1:]


class Git(BaseHTTPRequestHandler):
    def do_GET(self):
        expected = self.server.authorization
        if expected and self.headers.get("Authorization") != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        environment = dict(
            os.environ,
            GIT_PROJECT_ROOT=ROOT,
            GIT_HTTP_EXPORT_ALL="1",
            GIT_CONFIG_COUNT="1",
            GIT_CONFIG_KEY_0="safe.directory",
            GIT_CONFIG_VALUE_0="*",
            PATH_INFO=path,
            QUERY_STRING=query,
            REQUEST_METHOD=self.command,
            CONTENT_TYPE=self.headers.get("Content-Type", ""),
            CONTENT_LENGTH=self.headers.get("Content-Length", ""),
            HTTP_CONTENT_ENCODING=self.headers.get("Content-Encoding", ""),
            GIT_PROTOCOL=self.headers.get("Git-Protocol", ""),
        )
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pipe = subprocess.PIPE
        with subprocess.Popen(["git", "http-backend"], env=environment, stdin=pipe, stdout=pipe) as backend:
            # A request to fetch is small, and read to its end before the answer begins.
            backend.stdin.write(body)
            backend.stdin.close()
            status, headers = 200, []
            for line in iter(backend.stdout.readline, b""):
                name, colon, value = line.decode().strip().partition(": ")
                if not colon:
                    break
                if name.lower() == "status":
                    status = int(value.split()[0])
                else:
                    headers.append((name, value))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            while chunk := backend.stdout.read(1 << 16):
                self.wfile.write(chunk)

    do_POST = do_GET


def serve(port, authorization):
    server = ThreadingHTTPServer(("", int(port)), Git)
    server.authorization = authorization
    server.serve_forever()


locked = "Basic " + base64.b64encode(CREDENTIALS.encode()).decode()
threading.Thread(target=serve, args=(LOCKED_PORT, locked), daemon=True).start()
serve(PORT, None)
