"""What the edges to the web frameworks share: owners, answers, and what is told of a task."""

from pathlib import Path

STATIC = Path(__file__).parent / "static"
