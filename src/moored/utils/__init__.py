"""What every room may use: errors, logging, progress, versions, whole folders, the environment."""
