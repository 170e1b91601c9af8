"""What a model learned, forgot and drifted: measured, made a report of, and shown (`report/`)."""
