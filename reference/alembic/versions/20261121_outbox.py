"""outbox"""

from collections.abc import Sequence

from alembic import op
from celeriac.outbox import create_outbox, drop_outbox

revision: str = "0a1f5d3c9e27"
down_revision: str | None = "675bf49fb36a"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    create_outbox(op)


def downgrade() -> None:
    drop_outbox(op)
