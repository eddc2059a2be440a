"""Routes, and the tasks that they start."""
