"""A Flask application after its ten minutes."""

import os

from flask import Flask, session
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celeriac.flask import Celeriac, status_blueprint

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
celery = Celeriac()


class User(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


def whoever_asks() -> str:
    found: str = session.get("user", "")
    return found


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(
        SECRET_KEY="change me",
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///app.sqlite3"),
        CELERY={"broker_url": REDIS, "result_backend": REDIS},
    )
    db.init_app(app)
    celery.init_app(app, owner=whoever_asks)
    app.register_blueprint(status_blueprint(owner=whoever_asks))
    app.post("/log-in/<name>")(log_in)
    app.post("/users/<email>")(add_user)
    return app


@celery.task
def send_mail(user_id: int) -> str:
    return f"a mail to {db.session.get_one(User, user_id).email}"


def log_in(name: str) -> dict[str, str]:
    session["user"] = name  # an application of yours asks for a password
    return {"user": name}


def add_user(email: str) -> dict[str, str]:
    user = User(email=email)
    db.session.add(user)
    db.session.flush()
    task = send_mail.delay_on_commit(db.session, user.id)
    db.session.commit()
    return {"task_id": task.id}
