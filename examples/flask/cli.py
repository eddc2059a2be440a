"""The web server: `python ./cli.py [--host HOST] [--port PORT]`."""

import argparse
import signal
from types import FrameType

from flask import Flask
from waitress import create_server

from celeriac import ConfigurationError, exit_on_error
from celeriac.flask import read_config
from server.core import celery, create_app

THREADS = 16  # each open stream takes one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the file's")
    options = parser.parse_args()
    with exit_on_error():
        config = read_config()
        serve(create_app(config), options.host, options.port or config.port)


def serve(app: Flask, host: str, port: int) -> None:
    """Until SIGTERM or Ctrl-C; what is being answered then is answered."""
    try:
        server = create_server(app, host=host, port=port, threads=THREADS)
    except OSError as error:
        raise ConfigurationError(f"port {port} of {host} cannot be used: {error}") from None

    def stop(number: int, frame: FrameType | None) -> None:
        celery.stop(app)
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"http://{host}:{port}", flush=True)
    try:
        server.run()
    finally:
        server.close()


if __name__ == "__main__":
    main()
