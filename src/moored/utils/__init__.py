"""What every room may use: errors, logging, progress, whole folders, the environment."""
