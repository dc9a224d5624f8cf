"""What is found out before a model is loaded: what every container says, what memory takes, what an image knows."""
