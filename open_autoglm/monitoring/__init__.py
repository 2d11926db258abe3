"""A served model, watched: whether its promise is kept and, if it is not, why."""
