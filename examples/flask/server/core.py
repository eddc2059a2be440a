"""What exists before there is any configuration, and the factory that has one."""

from flask import Flask

from celeriac.flask import Celeriac, FileConfig, public, read_config, status_blueprint

celery = Celeriac()


def create_app(config: FileConfig | None = None) -> Flask:
    """An application with this configuration, or with the file's."""
    from server.controller.routes import routes  # whose tasks are made with `celery`

    app = Flask(__name__)
    app.config.from_mapping((config or read_config()).as_flask())
    celery.init_app(app)
    app.register_blueprint(routes)
    app.register_blueprint(status_blueprint(owner=public))
    return app
