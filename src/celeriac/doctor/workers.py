"""What is seen of the app's processes: its workers by remote control, Flower by its pages."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from celeriac.doctor.patient import TIMEOUT, Finding, Patient, Severity
from celeriac.settings import is_local, mask


def consumers(patient: Patient) -> Iterator[Finding]:
    if patient.consumed is None:
        return  # without a broker nobody can be asked
    if not patient.consumed:
        yield Finding(
            Severity.WARNING, "consumers",
            "no worker answers" if patient.conf.worker_enable_remote_control
            else "no worker can be asked: worker_enable_remote_control is off",
            "celery worker",
        )  # fmt: skip
        return
    taken = set().union(*patient.consumed.values())
    for queue in sorted(set(patient.app.amqp.queues) - taken):
        if not patient.on_rabbitmq:  # which says itself who consumes
            yield Finding(
                Severity.ERROR, "queues",
                f"nobody consumes queue {queue!r}: none of {len(patient.consumed)} workers does",
                f"celery worker -Q {queue}",
            )  # fmt: skip


def flower(patient: Patient) -> Iterator[Finding]:
    url = patient.flower_url
    if not url:
        return
    open_pages = []
    for page in ("/", "/api/workers"):
        try:
            if _status(url.rstrip("/") + page) == 200:
                open_pages.append(page)
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            yield Finding(
                Severity.NOTE, "flower",
                f"could not look at Flower: {mask('url', url)} does not answer: {reason}",
                "--flower with its address, if there is one",
            )  # fmt: skip
            return
    if open_pages:
        yield Finding(
            Severity.WARNING if is_local(url) else Severity.ERROR, "flower",
            f"Flower at {mask('url', url)} asks for no login ({', '.join(open_pages)}): who "
            "reaches it sees every argument and revokes any task",
            "--basic-auth=user:password or --auth, and a proxy with TLS before it",
        )  # fmt: skip


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """A redirect is to the page where one logs in."""


def _status(url: str) -> int:
    if urlsplit(url).scheme not in ("http", "https"):
        raise OSError("expected http:// or https://")
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


CHECKS = (consumers, flower)
