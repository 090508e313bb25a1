"""Pictures of the documentation, drawn from plans and estimates of real runs."""
